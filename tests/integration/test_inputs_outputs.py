"""What a handler gets for each kind of body, and what a client gets for each kind of result."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from support.archives import archive
from support.grpc_client import GrpcClient, failure
from support.http import Reply
from support.server import ServerProcess

#: Describes its row: for each key the Python type and the value.
ROWS = """
def tell(value):
    if isinstance(value, (bytes, bytearray)):
        return [type(value).__name__, bytes(value).decode("latin-1")]
    return [type(value).__name__, value]

def handle(data, context):
    if data is None:
        return None
    return [{key: tell(value) for key, value in row.items()} for row in data]
"""

#: Answers what the body says.
RESULTS = """
import json
import torch
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException

def handle(data, context):
    if data is None:
        return None
    answers = []
    for i, row in enumerate(data):
        order = row["body"] if "body" in row else json.loads(row["data"])
        do = order["do"]
        if do == "value":
            answers.append(order["value"])
        elif do == "bytes":
            answers.append(bytes.fromhex(order["value"]))
        elif do == "bytearray":
            answers.append(bytearray.fromhex(order["value"]))
        elif do == "tensor":
            answers.append(torch.arange(6).reshape(2, 3))
        elif do == "object":
            answers.append(object())
        elif do == "nothing":
            return None
        elif do == "wrong number":
            return []
        elif do == "raise":
            raise {"ValueError": ValueError, "MemoryError": MemoryError}[order["value"]]("secret text")
        elif do == "cuda":
            raise RuntimeError("CUDA out of memory, secret text")
        elif do == "prediction exception":
            raise PredictionException(order.get("text", "not today"), order["value"])
        elif do == "status":
            context.set_response_status(code=order["value"], phrase=order.get("phrase", ""), idx=i)
            answers.append("body")
        elif do == "content type":
            context.set_response_content_type(i, order["value"])
            answers.append("body")
        elif do == "header":
            context.set_response_header(i, order["name"], order["value"])
            answers.append("body")
        elif do == "streamed header":
            context.set_response_header(i, order["name"], order["value"])
            send_intermediate_predict_response(["part"], context.request_ids, "", 200, context)
            answers.append("body")
        elif do == "streamed status":
            context.set_response_status(code=order["value"], idx=i)
            send_intermediate_predict_response([""], context.request_ids, "", order.get("code", 200), context)
            answers.append("body")
        elif do == "request header":
            answers.append(str(context.get_request_header(i, order["value"])))
        elif do == "request id":
            answers.append(context.get_request_id(i))
        elif do == "big":
            answers.append(bytes(order["value"]))
        elif do == "exit":
            raise SystemExit(order["value"])
    return answers
"""

MAX_RESPONSE = 200_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "rows", ROWS)
    archive(store, "results", RESULTS)
    with ServerProcess(store=store, config={"max_response_size": str(MAX_RESPONSE)}) as running:
        for name in ("rows.mar", "results.mar"):
            reply = running.register(name)
            assert reply.status == 200, reply.text
        yield running


def row(server: ServerProcess, body: bytes, content_type: str | None) -> dict[str, Any]:
    headers = {} if content_type is None else {"Content-Type": content_type}
    reply = server.request("inference", "POST", "/predictions/rows", headers=headers, body=body)
    assert reply.status == 200, reply.text
    described: dict[str, Any] = reply.json()
    return described


def ask(server: ServerProcess, do: str, value: Any = None, **more: Any) -> Reply:
    order = json.dumps({"do": do, "value": value, **more})
    return server.predict("results", order, content_type="application/json")


# Inputs


@pytest.mark.parametrize(
    ("content_type", "body", "wanted"),
    [
        (None, b"a\xff", ["bytearray", "a\xff"]),
        ("application/octet-stream", b"a\x00", ["bytearray", "a\x00"]),
        ("image/jpeg", b"\xff\xd8", ["bytearray", "\xff\xd8"]),
        ("application/json", b'{"a": [1, null]}', ["dict", {"a": [1, None]}]),
        ("application/json; charset=utf-8", b"[1]", ["list", [1]]),
        ("application/json", b"7", ["int", 7]),
        ("application/json", b"{broken", ["bytearray", "{broken"]),
        ("application/json", b"\xff", ["bytearray", "\xff"]),
        ("text/plain", "é".encode(), ["str", "é"]),
        ("text/csv; charset=utf-8", b"1,2", ["str", "1,2"]),
        ("text/plain", b"\xff", ["bytearray", "\xff"]),
        ("application/octet-stream", b"", ["bytearray", ""]),
    ],
)
def test_body_by_content_type(server: ServerProcess, content_type: str | None, body: bytes, wanted: list[Any]) -> None:
    assert row(server, body, content_type) == {"body": wanted}


def test_get_without_a_body(server: ServerProcess) -> None:
    reply = server.request("inference", "GET", "/predictions/rows?ignored=1")
    assert reply.json() == {"body": ["bytearray", ""]}


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b"data=abc&x=1+2", {"data": "abc", "x": "1 2"}),
        (b"a=%E4%BD%A0", {"a": "你".encode().decode("latin-1")}),
        (b"a=1&a=2", {"a": "2"}),
        (b"a=", {"a": ""}),
        (b"hello", {}),
        (b"", {}),
    ],
)
def test_form_fields(server: ServerProcess, body: bytes, wanted: dict[str, str]) -> None:
    answer = row(server, body, "application/x-www-form-urlencoded")
    assert answer == {key: ["bytearray", value] for key, value in wanted.items()}


def multipart(*parts: tuple[str, str | None, str | None, bytes]) -> bytes:
    body = io.BytesIO()
    for name, file_name, content_type, content in parts:
        body.write(b"--XX\r\n")
        file_part = "" if file_name is None else f'; filename="{file_name}"'
        body.write(f'Content-Disposition: form-data; name="{name}"{file_part}\r\n'.encode())
        if content_type is not None:
            body.write(f"Content-Type: {content_type}\r\n".encode())
        body.write(b"\r\n" + content + b"\r\n")
    body.write(b"--XX--\r\n")
    return body.getvalue()


def test_multipart(server: ServerProcess) -> None:
    body = multipart(
        ("data", "a.bin", None, b"\x00\r\n--X\xff"),
        ("meta", "m.json", "application/json", b'{"a": 1}'),
        ("note", "n.txt", "text/plain", "é".encode()),
        ("field", None, None, b"plain"),
        ("json field", None, "application/json", b'{"q":1}'),
    )
    assert row(server, body, "multipart/form-data; boundary=XX") == {
        "data": ["bytearray", "\x00\r\n--X\xff"],
        "meta": ["dict", {"a": 1}],
        "note": ["str", "é"],
        "field": ["bytearray", "plain"],
        "json field": ["bytearray", '{"q":1}'],
    }


def test_large_multipart_file(server: ServerProcess) -> None:
    content = b"0123456789abcdef" * 8000
    body = multipart(("data", "a.bin", "application/octet-stream", content))
    answer = row(server, body, "multipart/form-data; boundary=XX")
    assert answer == {"data": ["bytearray", content.decode("latin-1")]}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data; boundary=XX", b"no boundary here"),
        ("multipart/form-data", b"--XX\r\n\r\n--XX--\r\n"),
        ("multipart/form-data; boundary=XX", multipart(("a", None, None, b"1"))[:-20]),
    ],
)
def test_malformed_multipart_is_that_clients_fault(server: ServerProcess, content_type: str, body: bytes) -> None:
    headers = {"Content-Type": content_type}
    reply = server.request("inference", "POST", "/predictions/rows", headers=headers, body=body)
    assert reply.status == 400
    assert row(server, b"x", None) == {"body": ["bytearray", "x"]}


def test_request_headers_reach_the_handler(server: ServerProcess) -> None:
    order = json.dumps({"do": "request header", "value": "X-My-Own"})
    reply = server.predict("results", order, content_type="application/json", **{"X-My-Own": "some value"})
    assert reply.text == "some value"
    assert ask(server, "request header", "X-Absent").text == "None"


def test_request_id_is_the_same_on_both_sides(server: ServerProcess) -> None:
    replies = [ask(server, "request id") for _ in range(3)]
    assert [reply.text for reply in replies] == [reply.headers["x-request-id"] for reply in replies]
    assert len({reply.text for reply in replies}) == 3


# Outputs


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain 你好", "plain 你好"),
        ("", ""),
        ([1, 2], "[\n  1,\n  2\n]"),
        ({"a": {"b": None}}, '{\n  "a": {\n    "b": null\n  }\n}'),
        ({"u": "é"}, '{\n  "u": "\\u00e9"\n}'),
        (7, "7"),
        (0.5, "0.5"),
        (True, "true"),
        (None, "null"),
    ],
)
def test_json_values_and_texts(server: ServerProcess, value: Any, text: str) -> None:
    reply = ask(server, "value", value)
    assert (reply.status, reply.text) == (200, text)
    assert "content-type" not in reply.headers


def test_bytes(server: ServerProcess) -> None:
    assert ask(server, "bytes", "0001ff").body == b"\x00\x01\xff"
    assert ask(server, "bytearray", "616263").body == b"abc"


def test_tensor_is_saved(server: ServerProcess) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.load(io.BytesIO(ask(server, "tensor").body), weights_only=True)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("do", "value", "status", "message"),
    [
        ("object", None, 503, "Unsupported model output data type."),
        ("nothing", None, 503, "Invalid model predict output"),
        ("wrong number", None, 503, "number of batch response mismatched"),
        ("raise", "ValueError", 503, "Prediction failed"),
        ("raise", "MemoryError", 507, "Out of resources"),
        ("cuda", None, 507, "Out of resources"),
        ("prediction exception", 599, 599, "not today"),
        ("prediction exception", 418, 418, "not today"),
    ],
)
def test_failures(server: ServerProcess, do: str, value: Any, status: int, message: str) -> None:
    reply = ask(server, do, value)
    assert reply.status == status
    assert reply.json() == {"code": status, "type": "InternalServerException", "message": message}
    assert reply.headers["content-type"] == "application/json"
    assert ask(server, "value", "alive").text == "alive"


@pytest.mark.parametrize("status", [201, 404, 413, 418, 500, 503])
def test_handler_sets_the_status(server: ServerProcess, status: int) -> None:
    reply = ask(server, "status", status)
    assert (reply.status, reply.reason, reply.text) == (status, "", "body")
    assert reply.headers["connection"] == ("keep-alive" if status < 400 else "close")
    assert reply.headers["x-request-id"]


def test_what_a_handler_finds_too_large_is_no_body_that_the_server_refuses(server: ServerProcess) -> None:
    reply = ask(server, "prediction exception", 413)
    assert (reply.status, reply.json()["message"]) == (507, "not today")


def test_a_handlers_own_503_without_a_text_is_no_missing_worker(server: ServerProcess) -> None:
    for text in ("", "later"):
        reply = ask(server, "prediction exception", 503, text=text)
        assert reply.json() == {"code": 503, "type": "InternalServerException", "message": text}
        assert "retry-after" not in reply.headers
    order = json.dumps({"do": "prediction exception", "value": 503, "text": ""}).encode()
    with GrpcClient(server) as client:
        code, details = failure(lambda: client.predict("results", order))
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "\norg.pytorch.serve.http.InternalServerException")


def test_the_text_of_a_prediction_exception_comes_whole(server: ServerProcess) -> None:
    text = "ä" * 20_000
    reply = ask(server, "prediction exception", 422, text=text)
    assert (reply.status, reply.json()["message"]) == (422, text)
    reply = ask(server, "prediction exception", 422, text="x" + "ä" * 40_000)
    assert reply.json()["message"] == "x" + "ä" * 32_767


def test_the_request_id_of_an_answer_is_the_servers(server: ServerProcess) -> None:
    reply = ask(server, "header", name="X-Request-Id", value="mine")
    assert reply.headers["x-request-id"] not in ("mine", "")


def test_a_name_without_a_value_in_the_query_is_a_field(server: ServerProcess) -> None:
    reply = server.request("inference", "POST", "/invocations?model_name=rows&first&last", body=b"x")
    assert reply.json() == {
        "model_name": ["bytearray", "rows"],
        "first": ["bytearray", ""],
        "last": ["bytearray", ""],
        "body": ["bytearray", "x"],
    }


@pytest.mark.parametrize("path", ["/predictions//1.0", "/explanations//1.0", "/v2/models//infer"])
def test_a_model_without_a_name_is_none(server: ServerProcess, path: str) -> None:
    reply = server.request("inference", "POST", path, body=b"x")
    assert (reply.status, reply.json()["message"]) == (404, "Model not found: ")


def test_handler_sets_the_reason(server: ServerProcess) -> None:
    assert ask(server, "status", 202, phrase="In good time").reason == "In good time"


def test_handler_sets_headers(server: ServerProcess) -> None:
    reply = ask(server, "content type", "image/png")
    assert reply.headers["content-type"] == "image/png"
    assert ask(server, "header", "a b; c", name="X-Mine").headers["x-mine"] == "a b; c"


def test_headers_of_a_handler_come_whole(server: ServerProcess) -> None:
    value = "v" * 60_000
    for do in ("header", "streamed header"):
        assert ask(server, do, value, name="X-Mine").headers["x-mine"] == value
    assert ask(server, "status", 202, phrase="p" * 5000).reason == "p" * 5000


@pytest.mark.parametrize("do", ["header", "streamed header"])
def test_headers_that_are_too_long_are_an_error_that_says_so(server: ServerProcess, do: str) -> None:
    reply = ask(server, do, "v" * 65_536, name="X-Mine")
    wanted = "The phrase and headers that the handler has set exceed 65536 bytes"
    assert (reply.status, reply.json()["message"]) == (500, wanted)


@pytest.mark.parametrize(("status", "code"), [(204, 200), (200, 204), (304, 200)])
def test_a_status_without_a_body_begins_no_stream(server: ServerProcess, status: int, code: int) -> None:
    reply = ask(server, "streamed status", status, code=code)
    assert (reply.status, reply.json()["message"]) == (500, "Invalid response from handler")
    for good in (202, 418):
        reply = ask(server, "streamed status", good)
        assert (reply.status, reply.text) == (good, "body")
        assert reply.headers["connection"] == ("keep-alive" if good < 400 else "close")


def test_over_grpc_long_headers_cost_nothing(server: ServerProcess) -> None:
    order = json.dumps({"do": "header", "name": "X-Mine", "value": "v" * 60_000}).encode()
    with GrpcClient(server) as client:
        assert client.predict("results", order) == b"body"


@pytest.mark.parametrize("name", ["X-Bad\r\nX-Injected", "X Bad", "", "X:Bad"])
def test_bad_header_name_is_an_error_and_injects_nothing(server: ServerProcess, name: str) -> None:
    reply = ask(server, "header", "v", name=name)
    assert reply.status == 500
    assert "x-injected" not in reply.headers


@pytest.mark.parametrize("value", ["a\r\nX-Injected: 1", "a\nb", "a\x00b"])
def test_bad_header_value_is_an_error_and_injects_nothing(server: ServerProcess, value: str) -> None:
    reply = ask(server, "header", value, name="X-Mine")
    assert reply.status == 500
    assert "x-injected" not in reply.headers


def test_largest_answer_passes_and_a_larger_one_costs_no_worker(server: ServerProcess) -> None:
    assert len(ask(server, "big", MAX_RESPONSE).body) == MAX_RESPONSE
    before = server.request("management", "GET", "/models/results").json()[0]["workers"]
    reply = ask(server, "big", MAX_RESPONSE + 1)
    assert reply.status == 500
    assert reply.json()["type"] == "InternalServerException"
    after = server.request("management", "GET", "/models/results").json()[0]["workers"]
    assert [worker["pid"] for worker in after] == [worker["pid"] for worker in before]


def test_handler_that_raises_system_exit_keeps_its_worker(server: ServerProcess) -> None:
    before = server.request("management", "GET", "/models/results").json()[0]["workers"]
    assert ask(server, "exit", 3).status in (500, 503)
    assert ask(server, "value", "alive").text == "alive"
    after = server.request("management", "GET", "/models/results").json()[0]["workers"]
    assert [worker["pid"] for worker in after] == [worker["pid"] for worker in before]
