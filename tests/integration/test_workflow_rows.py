"""What TorchServe's workflows do, row by row, where no other test comes by: archives, specifications, calls, data."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess
from support.wars import FUNCTIONS, NAMED, war

CHAIN = """
models:
  m: {url: named.mar}
dag:
  before: [m]
  m: [after]
"""
#: What each node's row has: keys, types, bytes.
SEEN = """
models: {}
dag:
  first: [text, both]
  text: [both]
"""
SEEN_FUNCTIONS = """
import json

def told(row):
    return {key: [type(value).__name__, bytes(value).decode() if isinstance(value, bytearray) else value]
            for key, value in row.items()}

def first(data, context):
    if data is None:
        return None
    context.set_response_content_type(0, "text/plain")
    headers = [context.get_request_header(0, name) for name in ("x-one", "x-two")]
    return [{"row": told(data[0]), "headers": headers, "file": context.manifest}]

def text(data, context):
    return None if data is None else ["<\\u00fc> " + str(context.get_request_header(0, "x-two"))]

def both(data, context):
    if data is None:
        return None
    return [{"row": told(data[0]), "type": context.get_request_header(0, "content-type")}]
"""
NUMBERS = """
models:
  early: {url: named.mar}
  batch-size: 3
  batch-size: 5
  max-batch-delay: 70
  late: {url: named.mar}
  configured: {url: configured.mar, max-workers: 1, batch-size: -1, max-batch-delay: -100, unknown: 1}
  none: {url: named.mar, max-workers: -3}
  spare: {url: nowhere.mar}
dag:
  before: [early, "", null]
  early: [late]
  late: [configured, none]
  none: []
"""
#: Loads for as long as a file says so.
SLOW_FUNCTIONS = """
import os
import time

def before(data, context):
    if data is None:
        while not os.path.exists("{file}"):
            time.sleep(0.01)
        return None
    return [data[0]["body"]]
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    # Model control is for models: workflows are registered without it, as in TorchServe.
    with ServerProcess(config={"enable_model_api": "false"}) as running:
        archive(running.store, "named", NAMED)
        configured = "minWorkers: 2\nmaxWorkers: 3\nbatchSize: 7\nmaxBatchDelay: 9\nresponseTimeout: 33\n"
        archive(running.store, "configured", NAMED, config_yaml=configured)
        war(running.store, "chain", CHAIN)
        war(running.store, "seen", SEEN, SEEN_FUNCTIONS)
        for name in ("chain", "seen"):
            assert register(running, f"{name}.war").status == 200
        yield running


def register(server: ServerProcess, url: str, more: str = "") -> Reply:
    return server.request("management", "POST", f"/workflows?url={url}{more}", timeout=90)


def unregister(server: ServerProcess, name: str) -> Reply:
    return server.request("management", "DELETE", f"/workflows/{name}", timeout=60)


def said(reply: Reply) -> tuple[int, str, str]:
    fields = reply.json()
    return reply.status, fields["type"], fields["message"]


def described(server: ServerProcess, name: str) -> dict[str, Any]:
    [model] = server.request("management", "GET", f"/models/{name}").json()
    return dict(model)


# The archive


def unpacked(server: ServerProcess) -> list[Path]:
    return list((server.run_dir / "models").iterdir())


@pytest.mark.parametrize(
    ("files", "manifest", "found"),
    [
        (("WAR-INF/MANIFEST.json", "{"), {}, (500, "InvalidWorkflowException", "Failed to parse signature.json.")),
        (("spec.yaml", "models: ["), None, (500, "InvalidWorkflowException", "Failed to parse yaml.")),
        (None, {"specFile": "gone.yaml"}, (500, "NoSuchFileException", "gone.yaml")),
    ],
)
def test_archives_that_are_none(
    server: ServerProcess, files: tuple[str, str] | None, manifest: dict[str, Any] | None, found: tuple[int, str, str]
) -> None:
    whole: dict[str, Any] = {
        "archiverVersion": "0.2.15",
        "createdOn": "11/29/2020",
        "workflow": {"description": "x", "handler": "functions.py", "specFile": "spec.yaml", "workflowName": "odd"},
    }
    whole["workflow"] |= manifest or {}
    path = war(server.store, "odd", CHAIN, manifest={} if files and manifest == {} else whole)
    if files is not None:
        with zipfile.ZipFile(path) as bundle:
            contents = {name: bundle.read(name) for name in bundle.namelist()} | {files[0]: files[1].encode()}
        with zipfile.ZipFile(path, "w") as bundle:
            for name, content in contents.items():
                bundle.writestr(name, content)
    before = unpacked(server)
    assert before, "those of the workflows that are there"
    assert said(register(server, "odd.war")) == found
    assert unpacked(server) == before


def test_an_archive_that_is_no_war_is_a_tar_whose_first_folder_does_not_count(
    server: ServerProcess, tmp_path: Path
) -> None:
    with zipfile.ZipFile(war(tmp_path, "tarred", CHAIN)) as bundle:
        bundle.extractall(tmp_path / "folder")
    with tarfile.open(server.store / "tarred.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "folder", "folder")
    assert register(server, "tarred.tar.gz").status == 200
    assert server.request("inference", "POST", "/wfpredict/tarred", body=b"x").text == "x before tarred__m after"
    assert unregister(server, "tarred").status == 200


# The specification


def test_numbers_names_and_what_is_left_out(server: ServerProcess) -> None:
    war(server.store, "numbers", NUMBERS)
    assert register(server, "numbers.war", "&response_timeout=11&startup_timeout=x").status == 200
    keys = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout")
    found = {
        name: tuple(described(server, f"numbers__{name}")[key] for key in keys)
        for name in ("early", "late", "configured", "none", "before")
    }
    assert found == {
        "early": (1, 1, 1, 50, 11, 120),
        "late": (1, 1, 5, 70, 11, 120),
        "configured": (2, 3, 7, 9, 33, 120),
        "none": (0, 0, 5, 70, 11, 120),
        "before": (1, 1, 1, 0, 11, 120),
    }
    assert server.request("management", "GET", "/models/numbers__spare").status == 404
    [told] = server.request("management", "GET", "/workflows/numbers").json()
    assert (told["batchSize"], told["maxBatchDelay"]) == (5, 70)
    assert told["workflowDag"] == "{before=[early, , null], early=[late], late=[configured, none], none=[]}"
    assert unregister(server, "numbers").status == 200


@pytest.mark.parametrize(
    ("models", "fault"),
    [
        ("m: {url: named.mar, batch-size: '4'}", "2: key models.m.batch-size: '4' is not a whole number: remove"),
        ("m: {url: named.mar, batch-size: 0}", "2: key models.m.batch-size: 0 is not between 1 and 65536, or -1 for"),
        ("batch-size: 65537", "2: key models.batch-size: 65537 is not between 1 and 65536, or -1 for that of model-"),
        ("max-batch-delay: -1", "2: key models.max-batch-delay: -1 is not between 0 and 2147483647, or -100 for"),
        ("max-batch-delay: -99", "2: key models.max-batch-delay: -99 is not between 0 and"),
        ("max-workers: 1025", "2: key models.max-workers: 1025 is not between -2147483648 and 1024"),
        ("retry-attempts: -1", "2: key models.retry-attempts: -1 is not between 0 and"),
        ("timeout-ms: 0", "2: key models.timeout-ms: 0 is not between 1 and"),
        ("m: {max-workers: 1}", "2: key models.m: the node m has no url: write below it where its archive is"),
        ("m: m.mar", "2: key models.m: 'm.mar' is not a mapping: write `url: m.mar` below it"),
        ("m: null", "2: key models.m: None is not a mapping"),
    ],
)
def test_specifications_that_are_none(server: ServerProcess, models: str, fault: str) -> None:
    war(server.store, "wrong", f"models:\n  {models}\ndag:\n  before: [m]\n")
    status, kind, message = said(register(server, "wrong.war"))
    assert (status, kind) == (400, "InvalidDAGException")
    assert message.startswith(f"spec.yaml:{fault}")


@pytest.mark.parametrize(("text", "missing"), [("models: {}\n", "dag"), ("dag: {before: []}\n", "models")])
def test_a_section_that_is_missing(server: ServerProcess, text: str, missing: str) -> None:
    war(server.store, "half", text)
    fault = f"spec.yaml: the section {missing} is missing"
    assert said(register(server, "half.war")) == (400, "InvalidDAGException", fault)


# Registering


def test_a_directory_is_no_archive(server: ServerProcess) -> None:
    (server.store / "folder").mkdir()
    assert said(register(server, "folder")) == (404, "WorkflowNotFoundException", "Workflow not found at: folder")


def test_what_does_not_count(server: ServerProcess) -> None:
    """It waits, whatever `synchronous` says, and looks for no key of S3 where S3 is not asked."""
    more = "&workflow_name=other&synchronous=false&s3_sse_kms=true&response_timeout=1.5"
    text = "Workflow other has been registered and scaled successfully."
    reply = register(server, "chain.war", more)
    assert reply.body == json.dumps({"status": text}, indent=2).encode() + b"\n"
    assert described(server, "other__m")["responseTimeout"] == 120
    assert server.request("inference", "POST", "/wfpredict/other", body=b"x").status == 200
    assert unregister(server, "other").body == b'{\n  "status": "Workflow \\"other\\" unregistered"\n}\n'


def test_a_name_that_is_being_registered(server: ServerProcess) -> None:
    gate = server.home / "open"
    spec = "models: {}\ndag:\n  before: []\n"
    war(server.store, "slow", spec, SLOW_FUNCTIONS.replace("{file}", str(gate)))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(register, server, "slow.war")
        try:
            is_there = lambda: server.request("management", "GET", "/models/slow__before").status == 200  # noqa: E731
            eventually(is_there, within=20, what="its node")
            busy = "Workflow slow is being registered; try again when that is done."
            assert said(register(server, "slow.war")) == (409, "ConflictStatusException", busy)
            assert said(unregister(server, "slow")) == (404, "WorkflowNotFoundException", "Workflow not found: slow")
        finally:
            gate.touch()
        assert first.result().status == 200
    assert said(register(server, "slow.war"))[2] == "Workflow slow is already registered."
    assert unregister(server, "slow").status == 200


# Other calls


@pytest.mark.parametrize(
    ("query", "token", "names"),
    [
        ("", None, ["chain", "seen"]),
        ("?limit=2", "2", ["chain", "seen"]),
        ("?limit=3", None, ["chain", "seen"]),
        ("?limit=1&next_page_token=1", "2", ["seen"]),
        ("?limit=1&next_page_token=2", None, []),
        ("?limit=101&next_page_token=x", None, ["chain", "seen"]),
        ("?limit=0", "0", []),
    ],
)
def test_pages(server: ServerProcess, query: str, token: str | None, names: list[str]) -> None:
    body = server.request("management", "GET", f"/workflows{query}").json()
    assert body.get("nextPageToken") == token
    assert [each["workflowName"] for each in body["workflows"]] == names


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_workflow_that_is_none(server: ServerProcess, method: str) -> None:
    reply = server.request("management", method, "/workflows/%3Cnone%3E")
    error = {"code": 404, "type": "WorkflowNotFoundException", "message": "Workflow not found: <none>"}
    assert reply.body == json.dumps(error, indent=2).encode() + b"\n", "no HTML escaping"


@pytest.mark.parametrize(("method", "path"), [("PATCH", "/workflows"), ("PATCH", "/workflows/chain")])
def test_methods_that_there_are_not(server: ServerProcess, method: str, path: str) -> None:
    text = "Requested method is not allowed, please refer to API document."
    assert said(server.request("management", method, path)) == (405, "MethodNotAllowedException", text)


# Requests

BOUNDARY = "x" * 20
FORM = (
    f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n'
    f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="b"; filename="b.txt"\r\n'
    f"content-type: text/plain\r\n\r\ntext\r\n--{BOUNDARY}--\r\n"
)


@pytest.mark.parametrize(
    ("content_type", "body", "row"),
    [
        (f"multipart/form-data; boundary={BOUNDARY}", FORM, {"a": ["bytearray", "1"], "b": ["str", "text"]}),
        ("application/x-www-form-urlencoded", "a=1&b=%2B", {"a": ["bytearray", "1"], "b": ["bytearray", "+"]}),
        ("application/json", '{"a": [1]}', {"body": ["dict", {"a": [1]}]}),
        ("text/plain", "text", {"body": ["str", "text"]}),
        ("image/png", "bytes", {"body": ["bytearray", "bytes"]}),
    ],
)
def test_what_goes_into_the_graph_and_from_node_to_node(
    server: ServerProcess, content_type: str, body: str, row: dict[str, Any]
) -> None:
    with server.raw() as connection:
        lines = ["POST /wfpredict/seen?c=3 HTTP/1.1", "host: a", f"content-type: {content_type}", "x-one: 1"]
        lines += ["x-two: first", "x-two: last", f"content-length: {len(body)}", "connection: close"]
        connection.send(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        _, headers, found = connection.read_answer()
    assert headers["content-type"] == "application/json", "whatever a node says of its answer's type"
    answer = json.loads(found)
    assert answer["row"].keys() == {"first", "text"}, "each answer under its parent's name"
    kind, first = answer["row"]["first"]
    assert kind == "bytearray"
    assert first == json.dumps({"row": row, "headers": ["1", "last"], "file": None}, indent=2)
    assert answer["row"]["text"] == ["bytearray", "<\u00fc> last"]


def test_the_log_of_metrics_has_functions_as_it_has_models(server: ServerProcess) -> None:
    def logged(name: str, model: str) -> list[float]:
        line = rf"{name}\.\w+:([\d.]+)\|#model_name:{model},model_version:default\|#hostname:"
        return [float(value) for value in re.findall(line, server.log("ts_metrics.log"))]

    war(server.store, "logged", CHAIN)
    assert register(server, "logged.war").status == 200
    for name in ("logged__before", "logged__m", "logged__after"):
        eventually(lambda name=name: logged("ts_inference_requests_total", name)[:1] == [0], within=20, what=name)
    for _ in range(3):
        assert server.request("inference", "POST", "/wfpredict/logged", body=b"x").status == 200
    for name in ("logged__before", "logged__m", "logged__after"):
        eventually(lambda name=name: sum(logged("ts_inference_requests_total", name)) == 3, within=20, what=name)
        eventually(lambda name=name: sum(logged("ts_inference_latency_microseconds", name)) > 0, within=20)
        eventually(lambda name=name: logged("ts_queue_latency_microseconds", name), within=20)
        # What the worker itself says of a call.
        times = rf"PredictionTime\.ms:[\d.]+\|#ModelName:{name},Level:Model\|"
        eventually(lambda times=times: re.search(times, server.log("model_metrics.log")), within=20, what=name)
    assert "model_name:logged__functions" not in server.log("ts_metrics.log")
    assert unregister(server, "logged").status == 200


def test_two_hundred_nodes_in_a_row(server: ServerProcess) -> None:
    names = [f"n{number}" for number in range(200)]
    edges = "".join(f"  {name}: [{after}]\n" for name, after in itertools.pairwise(names))
    step = "def step(data, context):\n    return data and [bytes(data[0]['body']) + b'.']\n"
    functions = step + "".join(f"{name} = step\n" for name in names)
    war(server.store, "long", f"models: {{}}\ndag:\n{edges}", functions)
    assert register(server, "long.war").status == 200
    reply = server.request("inference", "POST", "/wfpredict/long", body=b"x")
    assert (reply.status, reply.text) == (200, "x" + "." * 200)
    timings = reply.headers["server-timing"]
    assert timings.startswith("n0;dur=")
    assert len(timings) < 2600, "an answer whose head is larger than 4096 bytes is refused by proxies"
    assert unregister(server, "long").status == 200


def test_sixty_four_branches(server: ServerProcess) -> None:
    names = [f"n{number}" for number in range(64)]
    edges = "".join(f"  {name}: [join]\n" for name in names)
    functions = (
        "def branch(data, context):\n    return data and [data[0]['body']]\n"
        + "".join(f"{name} = branch\n" for name in ["first", *names])
        + "def join(data, context):\n    return data and [{key: len(value) for key, value in data[0].items()}]\n"
    )
    war(server.store, "fan", f"models: {{}}\ndag:\n  first: [{', '.join(names)}]\n{edges}", functions)
    assert register(server, "fan.war").status == 200
    ask = lambda size: server.request("inference", "POST", "/wfpredict/fan", body=b"x" * size)  # noqa: E731
    with ThreadPoolExecutor(3) as pool:  # each has up to 66 slots, of 256
        for size, reply in enumerate(pool.map(ask, range(30))):
            assert reply.json() == dict.fromkeys(names, size)
    assert unregister(server, "fan").status == 200


ODD = """
def first(data, context):
    return data and [data[0]["body"]]

def odd(data, context):
    if data is None:
        return None
    what = bytes(data[0]["body"]).decode()
    if what == "raise":
        raise ValueError("with a message")
    if what == "exit":
        raise SystemExit(3)
    return {"none": None, "empty": [], "two": [1, 2], "bytes": b"raw", "text": "abc", "dict": {"a": 1}, "int": 5,
            "[object]": [object()], "[bytes]": [b"raw"], "[text]": ["\u00fc"], "[dict]": [{"a": "\u00fc"}],
            "[list]": [[1, None]]}[what]

def last(data, context):
    return data and [bytes(data[0]["body"])]
"""


def test_what_a_function_may_return(server: ServerProcess) -> None:
    spec = "models: {retry-attempts: 0}\ndag: {first: [odd], odd: [last]}"
    war(server.store, "odd", spec, ODD)
    assert register(server, "odd.war").status == 200

    def ask(what: str) -> Reply:
        return server.request("inference", "POST", "/wfpredict/odd", body=what.encode())

    taken = {"[bytes]": "raw", "[text]": "\u00fc", "[dict]": '{\n  "a": "\\u00fc"\n}', "[list]": "[\n  1,\n  null\n]"}
    assert {what: ask(what).text for what in taken} == taken
    refused = ("none", "empty", "two", "bytes", "text", "dict", "int", "[object]", "raise", "exit")
    failed = (500, "InternalServerException", "Error executing odd")
    assert {what: said(ask(what)) for what in refused} == dict.fromkeys(refused, failed)
    assert unregister(server, "odd").status == 200


#: Waits until all three branches are at work, and says so.
MEETS = """
import os, time

def handle(data, context):
    if data is None:
        return None
    open(os.path.join("{folder}", context.model_name), "w").close()
    ends_at = time.monotonic() + 60
    while len(os.listdir("{folder}")) < 3 and time.monotonic() < ends_at:
        time.sleep(0.005)
    return ["%d at work" % len(os.listdir("{folder}"))]
"""


def test_branches_run_side_by_side(server: ServerProcess, tmp_path: Path) -> None:
    archive(server.store, "meets", MEETS.replace("{folder}", str(tmp_path)))
    branches = [f"b{number}" for number in range(3)]
    models = "".join(f"  {name}: {{url: meets.mar}}\n" for name in branches)
    joins = "".join(f"  {name}: [together]\n" for name in branches)
    functions = FUNCTIONS + (
        "\ndef together(data, context):\n    return None if data is None else "
        "[{key: bytes(value).decode() for key, value in data[0].items()}]\n"
    )
    spec = f"models:\n  timeout-ms: 100000\n{models}dag:\n  before: [{', '.join(branches)}]\n{joins}"
    war(server.store, "wide", spec, functions)
    assert register(server, "wide.war").status == 200
    found = server.request("inference", "POST", "/wfpredict/wide", body=b"x", timeout=120).json()
    assert found == dict.fromkeys(branches, "3 at work")
    assert unregister(server, "wide").status == 200
