"""The REST layer without a server around it: answers, arguments, routes, documents, metrics."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import falcon
import falcon.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.eventually import eventually

from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import (
    BadRequest,
    ModelNotFound,
    PayloadTooLarge,
    ServerError,
    ServiceUnavailable,
)
from wsgi_ts.rest import management, openapi
from wsgi_ts.rest.apps import KINDS, build_app
from wsgi_ts.rest.responses import BASE_HEADERS, encode_json, from_http_error
from wsgi_ts.settings.config import Config

Answer = dict[str, Any]


class SupervisorSocket:
    """The supervisor's end of the control socket: answers what `reply` returns, keeps what it was asked."""

    def __init__(self, run_dir: Path) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], Answer | None] = lambda request: {
            "ok": {"status": 200, "body": {"status": request["op"]}}
        }
        self.connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(run_dir / "control.sock"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        channel = Channel(connection)
        try:
            while True:
                request = channel.receive()
                self.requests.append(request)
                answer = self.reply(request)
                if answer is None:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                channel.send(answer)
        except ChannelClosed:
            return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            connection.close()


@dataclass
class Settings:
    """The instance as the apps see it."""

    config: Config
    run_dir: Path
    prefix: str = "wsgi-ts-none"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[SupervisorSocket]:
    running = SupervisorSocket(tmp_path)
    yield running
    running.close()


@pytest.fixture
def control(supervisor: SupervisorSocket, tmp_path: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(tmp_path)
    yield plane
    plane.close()


def client(control: ControlPlane, *kinds: str, **config: Any) -> falcon.testing.TestClient:
    settings = Settings(
        Config(**{"enable_model_api": True, "disable_token_authorization": True, **config}), Path("nowhere")
    )
    return falcon.testing.TestClient(build_app(kinds or ("management",), settings, control))


@pytest.fixture
def web(control: ControlPlane) -> falcon.testing.TestClient:
    return client(control)


# Control plane


def test_call_returns_the_result_and_leaves_out_what_was_not_given(
    supervisor: SupervisorSocket, control: ControlPlane
) -> None:
    supervisor.reply = lambda request: {"ok": {"index": 7}}
    assert control.call("new_segment", pid=3, other=None) == {"index": 7}
    assert supervisor.requests == [{"op": "new_segment", "pid": 3}]


def test_call_raises_the_supervisors_error(supervisor: SupervisorSocket, control: ControlPlane) -> None:
    supervisor.reply = lambda request: {"error": ModelNotFound.named("m").to_dict()}
    with pytest.raises(ServerError) as raised:
        control.call("describe_model", model_name="m")
    assert raised.value.to_dict() == ModelNotFound.named("m").to_dict()
    supervisor.reply = lambda request: {"ok": 1}
    assert control.call("status") == 1


def test_connections_are_used_again(supervisor: SupervisorSocket, control: ControlPlane) -> None:
    for _ in range(5):
        control.call("status")
    assert len(supervisor.connections) == 1


def test_connection_that_the_supervisor_closed_is_replaced(supervisor: SupervisorSocket, control: ControlPlane) -> None:
    control.call("status")
    supervisor.connections[0].shutdown(socket.SHUT_RDWR)
    assert control.call("status")
    assert [request["op"] for request in supervisor.requests] == ["status", "status"]


def test_supervisor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable, match="restarting"):
        ControlPlane(tmp_path).call("status")


def test_supervisor_that_dies_during_a_call(supervisor: SupervisorSocket, control: ControlPlane) -> None:
    supervisor.reply = lambda request: None
    with pytest.raises(ServiceUnavailable, match="restarting"):
        control.call("status")


def test_late_answer_never_reaches_the_next_call(supervisor: SupervisorSocket, control: ControlPlane) -> None:
    go_on = threading.Event()

    def reply(request: dict[str, Any]) -> Answer:
        if request["op"] == "slow":
            go_on.wait(60)
        return {"ok": request["op"]}

    supervisor.reply = reply
    with pytest.raises(ServiceUnavailable, match="did not answer"):
        control.call("slow", timeout_s=0.05)
    go_on.set()
    assert control.call("quick") == "quick"


def test_concurrent_calls_each_get_their_own_answer(supervisor: SupervisorSocket, control: ControlPlane) -> None:
    supervisor.reply = lambda request: {"ok": request["number"]}
    answers: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.__setitem__(n, control.call("echo", number=n))) for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {n: n for n in range(20)}


# Answers


def test_json_is_torchserves() -> None:
    body = encode_json({"b": "<é你>", "a": [], "n": {"x": 1.0}})
    assert body.decode() == '{\n  "b": "<é你>",\n  "a": [],\n  "n": {\n    "x": 1.0\n  }\n}\n'


def test_lone_surrogate_is_no_server_error() -> None:
    assert encode_json({"m": "\ud800"}) == b'{\n  "m": "?"\n}\n'


def test_every_answer_has_the_constant_headers(web: falcon.testing.TestClient) -> None:
    for path in ("/models", "/nope", "/workflows"):
        reply = web.simulate_get(path)
        assert {name: reply.headers[name] for name in BASE_HEADERS} == BASE_HEADERS
        assert len(reply.headers["x-request-id"]) == 36
        assert reply.headers["content-type"] == "application/json"
        assert not {"connection", "transfer-encoding", "server", "date"} & set(reply.headers)


def test_request_id_of_the_web_worker_is_kept(web: falcon.testing.TestClient) -> None:
    reply = web.simulate_get("/nope", extras={"wsgi_ts.request_id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"


def test_cors_headers(control: ControlPlane) -> None:
    web = client(control, cors_allowed_origin="https://a.example", cors_allowed_methods="GET, PUT")
    headers = web.simulate_get("/nope").headers
    assert headers["access-control-allow-origin"] == "https://a.example"
    assert headers["access-control-allow-methods"] == "GET, PUT"
    assert "access-control-allow-headers" not in headers


def test_unexpected_error_tells_the_client_nothing(
    supervisor: SupervisorSocket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
            raise RuntimeError("/secret/path")

    app = build_app(("management",), Settings(Config(), tmp_path))
    app.add_route("/broken", Broken())
    reply = falcon.testing.TestClient(app).simulate_get("/broken")
    assert reply.status_code == 500
    assert reply.json["type"] == "InternalServerException"
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"] in caplog.text
    assert "/secret/path" in caplog.text


def test_too_large_body_has_an_empty_answer(tmp_path: Path) -> None:
    app = build_app(
        ("management",), Settings(Config(enable_model_api=True, disable_token_authorization=True), tmp_path)
    )
    start = falcon.testing.StartResponseMock()
    environ = falcon.testing.create_environ(
        "/models",
        method="POST",
        headers={"content-type": "application/json"},
        body="{" + " " * management.MAX_JSON_BYTES,
    )
    assert b"".join(app(environ, start)) == b""
    assert start.status == "413 Content Too Large"
    assert start.headers == [("content-length", "0")]


def test_falcons_own_errors() -> None:
    assert from_http_error(falcon.HTTPRouteNotFound()).to_dict()["type"] == "ResourceNotFoundException"
    assert from_http_error(falcon.HTTPMethodNotAllowed(["GET"])).status == 405
    assert isinstance(from_http_error(falcon.HTTPContentTooLarge()), PayloadTooLarge)
    assert isinstance(from_http_error(falcon.HTTPBadRequest(description="why")), BadRequest)
    assert from_http_error(falcon.HTTPServiceUnavailable()).status == 503


# Routes


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nope", 404, "ResourceNotFoundException"),
        ("GET", "/models/a/b/c", 404, "ResourceNotFoundException"),
        ("GET", "/models/a/b/c/d", 404, "ResourceNotFoundException"),
        ("GET", "/token", 404, "ResourceNotFoundException"),
        ("GET", "/", 405, "MethodNotAllowedException"),
        ("PATCH", "/models", 405, "MethodNotAllowedException"),
        ("OPTIONS", "/models", 405, "MethodNotAllowedException"),
        ("POST", "/models/a", 405, "MethodNotAllowedException"),
        ("GET", "/models/a/1.0/set-default", 405, "MethodNotAllowedException"),
        ("POST", "/v1/models/a", 405, "MethodNotAllowedException"),
        ("PUT", "/workflows", 405, "MethodNotAllowedException"),
        ("PUT", "/workflows/w", 405, "MethodNotAllowedException"),
        ("POST", "/workflows", 400, "BadRequestException"),
    ],
)
def test_refusals(web: falcon.testing.TestClient, method: str, path: str, status: int, kind: str) -> None:
    reply = web.simulate_request(method, path)
    assert (reply.status_code, reply.json["code"], reply.json["type"]) == (status, status, kind)


@pytest.mark.parametrize(
    ("path", "resource", "template"),
    [
        ("/ping", "Ping", "/ping"),
        ("/predictions/m/1/a/b", "Predictions", "/predictions/{model}/{version}/{rest:path}"),
        ("/v1/models/m", "ModelResource", "/v1/models/{model}"),
        ("/v1/models/m:predict", "Predictions", "/v1/models/{model}:predict"),
        ("/models/m", "ModelResource", "/models/{model}"),
        ("/models/m/1.0", "ModelResource", "/models/{model}/{version}"),
        ("/models/m/invoke", "Predictions", "/models/{model}/invoke"),
        ("/models/m/1.0/set-default", "ModelResource", "/models/{model}/{version}/set-default"),
        ("/metrics", "Metrics", "/metrics"),
    ],
)
def test_one_app_for_one_address(
    control: ControlPlane, tmp_path: Path, path: str, resource: str, template: str
) -> None:
    app = build_app(KINDS, Settings(Config(), tmp_path), control)
    found = app._router.find(path)
    assert found is not None
    assert (type(found[0]).__name__, found[3]) == (resource, template)


@pytest.mark.parametrize("path", ["/models", "/models/", "/models//"])
def test_empty_segments_at_the_end_do_not_count(
    supervisor: SupervisorSocket, web: falcon.testing.TestClient, path: str
) -> None:
    assert web.simulate_get(path).status_code == 200
    assert supervisor.requests == [{"op": "list_models", "limit": 100, "next_page_token": 0}]


def test_calls_about_workflows(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    web.simulate_get("/workflows?limit=500&next_page_token=-1")
    web.simulate_get("/workflows/w/ignored")
    web.simulate_delete("/workflows/w")
    web.simulate_post("/workflows?url=a.war&response_timeout=x&startup_timeout=5&synchronous=false")
    web.simulate_post("/workflows?url=b.war", json={"url": "a.war", "response_timeout": 7, "s3_sse_kms": True})
    registered = {"op": "register_workflow", "url": "a.war"}
    assert supervisor.requests == [
        {"op": "list_workflows", "limit": 100, "next_page_token": 0},
        {"op": "describe_workflow", "workflow_name": "w"},
        {"op": "unregister_workflow", "workflow_name": "w"},
        {**registered, "response_timeout": 120, "startup_timeout": 5, "s3_sse_kms": False, "replace": False},
        {**registered, "response_timeout": 7, "startup_timeout": 120, "s3_sse_kms": True, "replace": False},
    ]


def test_path_is_percent_decoded(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    web.simulate_get("/models/%E4%BD%A0%20x/1.0")
    assert supervisor.requests == [{"op": "describe_model", "model_name": "你 x", "version": "1.0"}]


def test_status_and_body_of_the_supervisor_are_the_answer(
    supervisor: SupervisorSocket, web: falcon.testing.TestClient
) -> None:
    supervisor.reply = lambda request: {"ok": {"status": 202, "body": {"status": "Processing…"}}}
    reply = web.simulate_put("/models/m")
    assert (reply.status_code, reply.text) == (202, '{\n  "status": "Processing…"\n}\n')


def test_supervisor_gone_is_a_503(tmp_path: Path) -> None:
    reply = client(ControlPlane(tmp_path)).simulate_get("/models")
    assert (reply.status_code, reply.json["type"]) == (503, "ServiceUnavailableException")


# Arguments


@pytest.mark.parametrize(
    ("query", "limit", "token"),
    [
        ("", 100, 0),
        ("limit=2&next_page_token=4", 2, 4),
        ("limit=0", 0, 0),
        ("limit=101", 100, 0),
        ("limit=-1&next_page_token=-3", 100, 0),
        ("limit=two&next_page_token=x", 100, 0),
        ("limit=5&limit=7", 5, 0),
        ("limit=99999999999999", 100, 0),
    ],
)
def test_list_arguments(
    supervisor: SupervisorSocket, web: falcon.testing.TestClient, query: str, limit: int, token: int
) -> None:
    web.simulate_get("/models", query_string=query)
    assert supervisor.requests == [{"op": "list_models", "limit": limit, "next_page_token": token}]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/models/m", {"min_worker": 1, "max_worker": 1, "synchronous": False}),
        ("/models/m?min_worker=3", {"min_worker": 3, "max_worker": 3, "synchronous": False}),
        ("/models/m?max_worker=0", {"min_worker": 1, "max_worker": 0, "synchronous": False}),
        (
            "/models/m/2.0?min_worker=0&synchronous=TRUE&model_version=9",
            {"version": "2.0", "min_worker": 0, "max_worker": 0, "synchronous": True},
        ),
        (
            "/models/m?model_version=9&synchronous=1&number_gpu=1&timeout=5",
            {"version": "9", "min_worker": 1, "max_worker": 1, "synchronous": False},
        ),
        ("/models/m?min_worker=1.5", {"min_worker": 1, "max_worker": 1, "synchronous": False}),
    ],
)
def test_scale_arguments(
    supervisor: SupervisorSocket, web: falcon.testing.TestClient, path: str, wanted: dict[str, Any]
) -> None:
    web.simulate_put(path)
    assert supervisor.requests == [{"op": "scale_model", "model_name": "m", **wanted}]


def test_unregister_and_set_default(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    web.simulate_delete("/models/m")
    web.simulate_delete("/models/m/1.0")
    web.simulate_put("/models/m/2.0/set-default")
    web.simulate_get("/v1/models/m")
    assert supervisor.requests == [
        {"op": "unregister_model", "model_name": "m"},
        {"op": "unregister_model", "model_name": "m", "version": "1.0"},
        {"op": "set_default", "model_name": "m", "version": "2.0"},
        {"op": "kserve_ready", "model_name": "m"},
    ]


def test_register_by_query(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    web.simulate_post(
        "/models",
        query_string="url=a+b.mar&model_name=m&initial_workers=+2+&batch_size=&synchronous=False&runtime=",
    )
    assert supervisor.requests == [
        {
            "op": "register_model",
            "url": "a b.mar",
            "model_name": "m",
            "runtime": "",
            "initial_workers": 2,
            "synchronous": False,
        }
    ]


def test_register_waits_for_the_workers_unless_told(
    supervisor: SupervisorSocket, web: falcon.testing.TestClient
) -> None:
    web.simulate_post("/models?url=")
    assert supervisor.requests == [{"op": "register_model", "url": "", "synchronous": True}]


def test_register_without_url(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    replies = [
        web.simulate_post("/models"),
        web.simulate_post("/models?url=a.mar", headers={"content-type": "application/json"}),
        web.simulate_post("/models?url=a.mar", headers={"content-type": "application/json"}, body="{}"),
    ]
    for reply in replies:
        assert (reply.status_code, reply.json["message"]) == (400, "Parameter url is required.")
    assert supervisor.requests == []


@pytest.mark.parametrize(
    "body",
    [
        '{"url": "a.mar", "batch_size": 4, "synchronous": false, "model_name": null}',
        '{"url": "a.mar", "batch_size": "4", "synchronous": "False"}',
        "{'url': 'a.mar', batch_size: 4, synchronous: false}",
        "{url= a.mar; 'batch_size' => 4.0, synchronous: FALSE,} # by hand",
        "{url:a.mar,batch_size:4 ,synchronous:false,ignored:'a,b:c'}",
        '\ufeff {"url": "a.mar", "batch_size": 4.0, "synchronous": false, "unknown": {"x": []}}',
    ],
)
def test_register_by_json(supervisor: SupervisorSocket, web: falcon.testing.TestClient, body: str) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    reply = web.simulate_post("/models?url=ignored.mar", headers=headers, body=body)
    assert reply.status_code == 200, reply.text
    assert supervisor.requests == [{"op": "register_model", "url": "a.mar", "batch_size": 4, "synchronous": False}]


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        '"url"',
        "{",
        "{url: ]",
        "url: a.mar",
        '{"url": ["a"]}',
        '{"url": "a", "batch_size": 1.5}',
        '{"url": "a", "batch_size": true}',
        '{"url": "a", "initial_workers": 99999999999}',
        '{"url": "a", "synchronous": 1}',
        '{"url": "a", "synchronous": "no"}',
        '{"url": "a", "response_timeout": ""}',
        "[" * 20000,
        "{a: " * 5000,
    ],
)
def test_bad_json_is_a_400(supervisor: SupervisorSocket, web: falcon.testing.TestClient, body: str) -> None:
    reply = web.simulate_post("/models", headers={"content-type": "application/json"}, body=body)
    assert (reply.status_code, reply.json["type"]) == (400, "BadRequestException")
    assert supervisor.requests == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("batch_size=many", "Parameter batch_size must be a whole number: 'many' is not a whole number."),
        ("initial_workers=1.5", "Parameter initial_workers must be a whole number: '1.5' is not a whole number."),
        (
            "batch_size=4294967296",
            "Parameter batch_size must be a whole number: 4294967296 is not between -2147483648 and 2147483647.",
        ),
        ("synchronous=yes", "Parameter synchronous must be true or false: 'yes' is neither true nor false."),
    ],
)
def test_arguments_of_another_kind_count_as_absent_and_the_log_warns(
    supervisor: SupervisorSocket,
    web: falcon.testing.TestClient,
    caplog: pytest.LogCaptureFixture,
    query: str,
    message: str,
) -> None:
    assert web.simulate_post("/models", query_string=f"url=a.mar&{query}").status_code == 200
    name = query.partition("=")[0]
    (asked,) = supervisor.requests
    assert asked.get(name) in ((False,) if name == "synchronous" else (None,))
    assert f"{message} The default counts." in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "query", "warning"),
    [
        # It has no effect, and the number of workers becomes the default: 1.
        (
            "PUT",
            "/models/m",
            "min_workers=3",
            "PUT /models/{model} has no argument 'min_workers'; did you mean min_worker?",
        ),
        ("PUT", "/models/m/1.0", "batch_size=8", "PUT /models/{model}/{version} has no argument 'batch_size'"),
        (
            "PUT",
            "/models/m",
            "min_worker=1&number_gpu=1&timeout=-1&synchronous=true&max_worker=2&model_version=1",
            None,
        ),
        (
            "POST",
            "/models",
            "url=a.mar&initial_worker=1",
            "POST /models has no argument 'initial_worker'; did you mean initial_workers?",
        ),
        # A presigned URL whose & are no %26.
        (
            "POST",
            "/models",
            "url=https://b/m.mar?X-Amz-Algorithm=A&X-Amz-Signature=top",
            "has no argument 'X-Amz-Signature'",
        ),
        (
            "POST",
            "/models",
            "url=a.mar&batch_size=1&s3_sse_kms=true&startup_timeout=9&runtime=python&handler=h.py",
            None,
        ),
    ],
)
def test_arguments_without_an_effect_are_named_in_the_log(
    supervisor: SupervisorSocket,
    web: falcon.testing.TestClient,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    query: str,
    warning: str | None,
) -> None:
    assert web.simulate_request(method, path, query_string=query).status_code == 200
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [] if warning is None else len(lines) == 1 and warning in lines[0]
    assert "top" not in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "warning"),
    [
        (
            "/models",
            '{"url": "a.mar", "batchSize": 8}',
            "POST /models has no argument 'batchSize'; did you mean batch_size?",
        ),
        ("/workflows", '{"url": "a.war", "name": "w"}', "POST /workflows has no argument 'name'"),
        ("/models", '{"url": "a.mar", "batch_size": 8}', None),
    ],
)
def test_json_arguments_without_an_effect_are_named_in_the_log(
    supervisor: SupervisorSocket,
    web: falcon.testing.TestClient,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: str,
    warning: str | None,
) -> None:
    assert web.simulate_post(path, headers={"content-type": "application/json"}, body=body).status_code == 200
    assert [record.getMessage() for record in caplog.records] == ([] if warning is None else [warning])


def test_body_that_is_not_utf8(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    reply = web.simulate_post("/models", headers={"content-type": "application/json"}, body=b'{"url": "\xff"}')
    assert reply.status_code == 400


def test_model_api_gate(supervisor: SupervisorSocket, control: ControlPlane) -> None:
    web = client(control, enable_model_api=False)
    for reply in (
        web.simulate_post("/models"),
        web.simulate_delete("/models/m"),
        web.simulate_delete("/models/m/1"),
    ):
        assert (reply.status_code, reply.json["type"]) == (405, "MethodNotAllowedException")
    assert web.simulate_put("/models/m").status_code == 200
    assert web.simulate_get("/models").status_code == 200
    assert [request["op"] for request in supervisor.requests] == ["scale_model", "list_models"]


@given(st.text(max_size=20))
def test_any_text_is_a_number_or_absent(text: str) -> None:
    number = management.to_integer(text)
    assert number is None or (-(2**31) <= number < 2**31 and int(text) == number)


@given(st.binary(max_size=60))
def test_any_json_body_is_arguments_or_a_400(body: bytes) -> None:
    try:
        fields = management.parse_body(b"{" + body)
    except BadRequest:
        return
    assert isinstance(fields, dict)


# Documents


def test_documents(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    config = Config(enable_model_api=True, disable_token_authorization=True)
    document = openapi.document(("management",), config)
    assert web.simulate_options("/").json == document
    for method in ("GET", "POST", "OPTIONS"):
        assert web.simulate_request(method, "/api-description/").json == document
    assert list(document) == ["openapi", "info", "paths", "components"]
    assert set(document["paths"]) >= {
        "/",
        "/api-description",
        "/models",
        "/models/{model_name}",
        "/models/{model_name}/{model_version}",
        "/models/{model_name}/{model_version}/set-default",
        "/metrics",
    }
    assert list(document["paths"]["/models/{model_name}"]) == ["get", "put", "delete", "options"]
    assert "/metrics" in openapi.document(("metrics",), config)["paths"]
    names = [
        operation["operationId"]
        for path in openapi.document(("inference", "management", "metrics"), config)["paths"].values()
        for operation in path.values()
    ]
    assert len(names) == len(set(names))


def test_document_of_a_model(supervisor: SupervisorSocket, web: falcon.testing.TestClient) -> None:
    for path in ("/models/m", "/models/m/1.0"):
        assert list(web.simulate_options(path).json["paths"]) == [
            "/models/{model_name}",
            "/models/{model_name}/{model_version}",
            "/models/{model_name}/{model_version}/set-default",
        ]
    supervisor.reply = lambda request: {"error": ModelNotFound.named("m").to_dict()}
    assert web.simulate_options("/models/m").status_code == 404


# Metrics


def test_metrics_go_to_the_log_by_default(control: ControlPlane) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        reply = client(control, "metrics").simulate_request(method, "/metrics")
        assert (reply.status_code, reply.text) == (200, "")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_metrics_are_asked_of_the_supervisor(
    supervisor: SupervisorSocket, control: ControlPlane, tmp_path: Path
) -> None:
    supervisor.reply = lambda request: {"ok": "# TYPE a gauge\n"}
    web = falcon.testing.TestClient(
        build_app(("metrics",), Settings(Config(metrics_mode="prometheus"), tmp_path), control)
    )
    assert web.simulate_get("/metrics").text == "# TYPE a gauge\n"
    web.simulate_get("/metrics?name[]=a,b&name[]=c")
    web.simulate_get("/metrics?name[]=a")
    names = [request.get("names") for request in supervisor.requests]
    assert names == [None, ["a,b", "c"], ["a"]]


def test_eventually_names_what_did_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.eventually.LEAST_S", 0.1)
    with pytest.raises(AssertionError, match=r"a thing: not within 0\.15 s"):
        eventually(lambda: False, within=0.05, what="a thing")
