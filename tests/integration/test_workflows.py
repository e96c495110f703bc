"""Workflows as TorchServe has them: registration, description, answers, and the texts of everything that goes wrong."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess
from support.wars import NAMED, war

from wsgi_ts.cli.status import format_state

#: `max_request_size`, by default.
LIMIT = 6_553_500
CHAIN = """
models:
  min-workers: 1
  max-workers: 1
  batch-size: 3
  max-batch-delay: 60000
  retry-attempts: 3
  timeout-ms: 5000
  m1: {url: named.mar, max-workers: 2, batch-size: 4}
  m2: {url: named.mar}
dag:
  before: [m1]
  m1: [m2]
  m2: [after]
"""
#: Two branches and a node that reads both.
DIAMOND = """
models:
  a: {url: named.mar}
  b: {url: named.mar}
dag:
  first: [a, b]
  a: [join]
  b: [join]
"""
DIAMOND_FUNCTIONS = """
def first(data, context):
    return None if data is None else [data[0]["body"]]

def join(data, context):
    if data is None:
        return None
    row = data[0]
    return [{"keys": list(row), "a": bytes(row["a"]).decode(), "b": bytes(row["b"]).decode()}]
"""
#: Several last nodes; what the second one answers with the request says.
ENDS = """
models:
  unused: {url: nowhere.mar}
dag:
  first: [left, right]
"""
ENDS_FUNCTIONS = """
import json

def first(data, context):
    return None if data is None else [data[0]["body"]]

def left(data, context):
    return None if data is None else [{"left": 1}]

def right(data, context):
    return None if data is None else [bytes(data[0]["body"])]
"""
#: What a row looks like.
ROW = """
dag:
  look: []
models: {}
"""
ROW_FUNCTIONS = """
def look(data, context):
    if data is None:
        return None
    row = {key: (type(value).__name__, value if isinstance(value, (dict, str)) else bytes(value).decode())
           for key, value in data[0].items()}
    context.set_response_status(418, "teapot")
    context.set_response_header(0, "x-mine", "1")
    return [{"row": row, "rows": len(data), "header": context.get_request_header(0, "x-asked"),
             "manifest": context.manifest, "model": context.model_name, "file": open(
                 context.system_properties["model_dir"] + "/extra.txt").read()}]
"""
#: Fails, hangs or answers, as its request says; counts how often it was called. `wait` ends with the file of that name.
MOODS = """
import os, time
from ts.utils.util import PredictionException
calls = {}

def handle(data, context):
    if data is None:
        return None
    what, _, name = bytes(data[0].get("body")).decode().partition(":")
    calls[name] = calls.get(name, 0) + 1
    if what == "fail" or (what == "once" and calls[name] == 1):
        raise ValueError("no")
    if what == "busy once" and calls[name] == 1:
        raise PredictionException("", 503)
    if what == "refuse":
        raise PredictionException("not this", 400)
    if what == "sleep":
        time.sleep(float(name))
    ends_at = time.monotonic() + 100
    while what == "wait" and not os.path.exists(name) and time.monotonic() < ends_at:
        time.sleep(0.005)
    return ["%s %d" % (what, calls[name])]
"""
MOOD = """
models:
  retry-attempts: 2
  timeout-ms: 60000
  mood: {url: moods.mar}
dag:
  mood: []
"""
#: The workflow as a whole has less time than its node.
HASTY = MOOD + "options: {timeout-ms: 400}\n"
STALLED = """
models:
  mood: {url: moods.mar, retry-attempts: 1, timeout-ms: 600}
dag:
  mood: []
"""
#: An attempt has time to begin on a busy machine, too.
LATE = STALLED.replace("600", "6000")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(config={"metrics_mode": "prometheus"}) as running:
        store = running.store
        archive(store, "named", NAMED)
        archive(store, "moods", MOODS)
        archive(store, "broken", "def handle(data, context):\n    raise ValueError('broken')\n")
        war(store, "chain", CHAIN)
        war(store, "diamond", DIAMOND, DIAMOND_FUNCTIONS)
        war(store, "ends", ENDS, ENDS_FUNCTIONS)
        war(store, "row", ROW, ROW_FUNCTIONS, files={"extra.txt": "extra"})
        war(store, "mood", MOOD)
        war(store, "stalled", STALLED)
        war(store, "late", LATE)
        war(store, "hasty", HASTY)
        for name in ("chain", "diamond", "ends", "row", "mood", "stalled", "late", "hasty"):
            assert register(running, f"{name}.war").status == 200
        yield running


def register(server: ServerProcess, url: str, **arguments: object) -> Reply:
    query = "&".join(f"{name}={value}" for name, value in {"url": url, **arguments}.items())
    return server.request("management", "POST", f"/workflows?{query}", timeout=90)


def ask(server: ServerProcess, workflow: str, body: bytes | str = b"", method: str = "POST", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.request("inference", method, f"/wfpredict/{workflow}", body=body, headers=named)


def said(reply: Reply) -> tuple[int, str, str]:
    fields = reply.json()
    assert fields["code"] == reply.status
    return reply.status, fields["type"], fields["message"]


def models(server: ServerProcess) -> list[str]:
    return [each["modelName"] for each in server.request("management", "GET", "/models").json()["models"]]


# Answers


def test_a_chain_answers_with_what_its_last_node_says(server: ServerProcess) -> None:
    reply = ask(server, "chain", "data=hello", content_type="application/x-www-form-urlencoded")
    assert (reply.status, reply.text) == (200, "hello before chain__m1 chain__m2 after")
    assert reply.headers["content-type"] == "application/json"
    assert [entry.split(";")[0] for entry in reply.headers["server-timing"].split(", ")] == [
        "before",
        "m1",
        "m2",
        "after",
    ]


def test_a_lone_request_does_not_wait_for_the_batch_delay_of_each_node(server: ServerProcess) -> None:
    assert ask(server, "chain", b"x").status == 200, "one delay is longer than all attempts together"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_any_method_and_any_rest_of_the_path(server: ServerProcess, method: str) -> None:
    reply = server.request("inference", method, "/WfPredict/chain/1.0/rest?data=ignored", body=b"x")
    assert (reply.status, reply.text) == (200, "x before chain__m1 chain__m2 after")


def test_what_has_two_parents_reads_both_by_name(server: ServerProcess) -> None:
    reply = ask(server, "diamond", b"x")
    assert reply.json() == {"keys": ["a", "b"], "a": "x diamond__a", "b": "x diamond__b"}


def test_several_last_nodes_answer_together(server: ServerProcess) -> None:
    reply = ask(server, "ends", json.dumps({"r": [1]}))
    assert reply.body == b'{\n  "left": {\n    "left": 1\n  },\n  "right": {\n    "r": [\n      1\n    ]\n  }\n}\n'


@pytest.mark.parametrize(
    ("answer", "message"), [("[1, 2]", "[1,2]"), ('"abc"', '"abc"'), ("text", '"text"'), ("7", "7")]
)
def test_each_of_several_last_nodes_has_to_answer_with_an_object(
    server: ServerProcess, answer: str, message: str
) -> None:
    assert said(ask(server, "ends", answer)) == (500, "InternalServerException", message)


def test_what_the_first_node_reads(server: ServerProcess) -> None:
    reply = server.request(
        "inference",
        "POST",
        "/wfpredict/row?a=1",
        body=b'{"k": 1}',
        headers={"content-type": "application/json", "x-asked": "yes"},
    )
    assert reply.status == 200, "a node's own status is dropped"
    assert "x-mine" not in reply.headers
    assert reply.json() == {
        "row": {"body": ["dict", {"k": 1}]},
        "rows": 1,
        "header": "yes",
        "manifest": None,
        "model": "row__look",
        "file": "extra",
    }


def test_a_large_body_goes_through(server: ServerProcess) -> None:
    body = b"0123456789abcdef" * 65536
    reply = ask(server, "chain", body)
    assert reply.body == body + b" before chain__m1 chain__m2 after"


@pytest.mark.parametrize(
    ("path", "status", "kind", "message"),
    [
        ("/wfpredict/nope", 404, "WorkflowNotFoundException", "Workflow not found: nope"),
        (
            "/wfpredict",
            404,
            "ResourceNotFoundException",
            "Requested resource is not found, please refer to API document.",
        ),
        ("/wfpredict/predict", 404, "ModelNotFoundException", "Model not found: wfpredict"),
        ("/wfpredict/chain/predict", 404, "ModelNotFoundException", "Model not found: wfpredict"),
    ],
)
def test_paths_that_find_nothing(server: ServerProcess, path: str, status: int, kind: str, message: str) -> None:
    assert said(server.request("inference", "POST", path, body=b"x")) == (status, kind, message)


def test_a_node_that_fails_is_tried_again(server: ServerProcess) -> None:
    assert ask(server, "mood", b"once:here").text == "once 2"
    # The handler's own 503, even without a text, is no full queue, which is not tried again.
    assert ask(server, "mood", b"busy once:there").text == "busy once 2"
    assert said(ask(server, "mood", b"fail:all")) == (500, "InternalServerException", "Error executing mood")
    assert ask(server, "mood", b"count:all").text == "count 4", "three attempts before this one"
    invoked = re.findall(
        r" (\w+) .*Invoking -  mood for attempt (\d)", server.log().replace("[", " ").replace("]", " ")
    )
    assert set(invoked) == {("INFO", "1"), ("INFO", "2")}, "the first attempt is that with number 0"
    failed = [line.rpartition(" - ")[2] for line in server.log().splitlines() if "mood" in line and "ERROR" in line]
    again = "Timed out while executing mood for attempt %d"
    assert failed[-3:] == [again % 0, again % 1, "mood : Prediction failed"], "TorchServe says so of any failed attempt"


def test_an_attempt_that_is_too_late_is_not_run_twice(server: ServerProcess, tmp_path: Path) -> None:
    """The next attempt waits for the one that has begun, and takes its answer."""
    told = "Timed out while executing mood for attempt 0"
    before = server.log().count(told)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server, "late", f"wait:{tmp_path}/gate")
        eventually(lambda: server.log().count(told) > before, within=20, what="the end of the first attempt's time")
        (tmp_path / "gate").touch()
        assert asked.result().text == "wait 1"


def test_a_node_that_never_answers(server: ServerProcess) -> None:
    began = time.monotonic()
    assert said(ask(server, "stalled", b"sleep:2.5")) == (500, "InternalServerException", "Error executing mood")
    assert time.monotonic() - began > 1.15, "two attempts of 600 ms"
    log = server.log()
    assert "Timed out while executing mood for attempt 0" in log
    assert "mood : it has not answered within 600 ms" in log


def test_the_client_s_own_deadline(server: ServerProcess) -> None:
    reply = ask(server, "mood", b"sleep:1", x_request_timeout_ms="200")
    assert (reply.status, reply.json()["type"]) == (408, "RequestTimeoutException")


def test_the_deadline_of_the_workflow(server: ServerProcess) -> None:
    """It holds where the client gives none, or a later one; a client's earlier one goes before."""
    [described] = server.request("management", "GET", "/workflows/hasty").json()
    assert described["longestMs"] == 400
    late = (408, "RequestTimeoutException", "The workflow was not finished in its timeout-ms of 400")
    assert said(ask(server, "hasty", b"sleep:1")) == late
    assert said(ask(server, "hasty", b"sleep:1", x_request_timeout_ms="5000")) == late
    reply = ask(server, "hasty", b"sleep:1", x_request_timeout_ms="100")
    assert said(reply) == (408, late[1], "The workflow was not finished in the time that the client gave")
    eventually(lambda: ask(server, "hasty", b"count:hasty").status == 200, within=60, what="its node is free again")


# The nodes as models


def test_nodes_are_models(server: ServerProcess) -> None:
    listed = models(server)
    assert {"chain__m1", "chain__m2", "diamond__a", "diamond__b", "mood__mood"} <= set(listed)
    assert not [name for name in listed if "before" in name or "functions" in name], "functions are not listed"
    [model] = server.request("management", "GET", "/models/chain__m1").json()
    assert (model["minWorkers"], model["batchSize"], model["maxBatchDelay"], model["modelUrl"]) == (
        2,
        4,
        60000,
        "named.mar",
    )
    [function] = server.request("management", "GET", "/models/chain__before").json()
    assert (function["modelName"], function["modelVersion"], function["modelUrl"]) == ("chain__before", "1.0", None)
    assert (function["minWorkers"], function["batchSize"], function["maxBatchDelay"]) == (1, 1, 0)
    assert server.predict("chain__before", b"x").text == "x before"
    assert server.predict("chain__m1", b"x").text == "x chain__m1"
    assert server.request("inference", "GET", "/ping").status == 200


def test_all_functions_of_a_workflow_share_a_process(server: ServerProcess) -> None:
    pids = set()
    for name in ("chain__before", "chain__after"):
        [described] = server.request("management", "GET", f"/models/{name}").json()
        pids |= {worker["pid"] for worker in described["workers"]}
    assert len(pids) == 1


def test_a_node_can_be_scaled(server: ServerProcess) -> None:
    for name in ("diamond__a", "diamond__join"):
        reply = server.request("management", "PUT", f"/models/{name}?min_worker=2&synchronous=true")
        assert reply.json() == {"status": f"Workers scaled to 2 for model: {name}"}
        [described] = server.request("management", "GET", f"/models/{name}").json()
        assert len(described["workers"]) == 2
    assert ask(server, "diamond", b"x").status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models/chain__before/9.9"),
        ("DELETE", "/models/chain__before/9.9"),
        ("PUT", "/models/chain__before/9.9?min_worker=2"),
        ("PUT", "/models/chain__before/9.9/set-default"),
    ],
)
def test_a_function_has_one_version(server: ServerProcess, method: str, path: str) -> None:
    found = said(server.request("management", method, path))
    text = "Model version: 9.9 does not exist for model: chain__before"
    assert found == (404, "ModelVersionNotFoundException", text)
    assert server.predict("chain__before", b"x").text == "x before"
    reply = server.request("management", "PUT", "/models/chain__before/1.0/set-default")
    status = 'Default version successfully updated for model "chain__before" to "1.0"'
    assert (reply.status, reply.json()) == (200, {"status": status})


def test_a_body_that_cannot_be_read(server: ServerProcess) -> None:
    """The client has to mend it, so it is told at once; what a handler answers with 400 is its node's failure."""
    began = server.log().count("Invoking -")
    for content_type, body in (("multipart/form-data", b"x"), ("application/json", b"[" * 2000 + b"]" * 2000)):
        plain = server.request(
            "inference", "POST", "/predictions/mood__mood", body=body, headers={"content-type": content_type}
        )
        assert said(plain)[:2] == (400, "BadRequestException")
        assert said(ask(server, "mood", body, content_type=content_type)) == said(plain)
    assert server.log().count("Invoking -") == began, "no other attempt"
    assert said(ask(server, "mood", b"refuse:all")) == (500, "InternalServerException", "Error executing mood")


def test_a_node_without_a_worker_and_one_that_is_gone(server: ServerProcess) -> None:
    war(server.store, "bare", "models:\n  m: {url: named.mar, max-workers: 0}\ndag:\n  before: [m]\n")
    assert register(server, "bare.war").status == 200
    reply = ask(server, "bare", b"x")
    assert reply.status == 503
    assert reply.json()["message"].startswith('Model "bare__m" has no worker to serve inference request.')
    assert server.request("management", "DELETE", "/models/bare__m").status == 200
    assert said(ask(server, "bare", b"x")) == (500, "InternalServerException", "bare__m")
    status, kind, message = said(server.request("management", "DELETE", "/workflows/bare"))
    assert (status, kind) == (500, "InternalServerException")
    assert message == "Error while unregistering the workflow bare. Details: Model not found: bare__m"
    assert said(server.request("management", "GET", "/workflows/bare"))[0] == 404


def test_workflows_are_counted(server: ServerProcess) -> None:
    war(server.store, "counted", MOOD)
    assert register(server, "counted.war").status == 200
    for body, status in ((b"once:counted", 200), (b"fine:counted", 200), (b"fail:counted", 500)):
        assert ask(server, "counted", body).status == status
    label = 'workflow_name="counted",'

    def counted(name: str, more: str = "") -> float:
        found = samples_of(server, "counted")
        return found.get(f"ts_workflow_{name}{{{label}{more}}}", 0.0)

    def are_counted() -> bool:
        """What the web worker counts may come a moment after its answer."""
        assert (counted("requests_total", 'code="200",'), counted("requests_total", 'code="500",')) == (2, 1)
        assert (counted("latency_seconds_count"), counted("retries_total")) == (3, 3)
        assert counted("node_runs_total", 'node="mood",') == 3
        return counted("latency_microseconds") > 0 and counted("node_seconds_total", 'node="mood",') > 0

    eventually(are_counted, within=20)
    # What is answered without a walk counts, too.
    assert ask(server, "counted", b"x", content_type="multipart/form-data").status == 400
    for framing in (f"content-length: {LIMIT + 1}", "transfer-encoding: chunked"):
        with server.raw() as connection:
            connection.send(f"POST /wfpredict/counted HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n".encode())
            if "chunked" in framing:
                connection.send(b"%x\r\n" % (LIMIT + 1) + bytes(LIMIT + 1))
            assert connection.read_head()[0].split()[1] == b"413"
    assert server.request("management", "PUT", "/models/counted__mood?min_worker=0&max_worker=0").status == 202
    eventually(lambda: ask(server, "counted", b"x").status == 503, within=20, what="no worker")
    assert ask(server, "counted", b"x").status == 503
    assert server.request("management", "DELETE", "/models/counted__mood").status == 200
    assert ask(server, "counted", b"x").status == 500

    def with_code(code: int) -> float:
        return counted("requests_total", f'code="{code}",')

    eventually(lambda: [with_code(code) for code in (400, 413, 500)] == [1, 2, 2], within=20, what="requests by code")
    eventually(lambda: with_code(503) >= 2, within=20, what="those without a worker")
    assert server.request("management", "DELETE", "/workflows/counted", timeout=60).status == 500


def samples_of(server: ServerProcess, workflow: str) -> dict[str, float]:
    """The samples of a workflow, by name and labels."""
    lines = server.request("metrics", "GET", "/metrics").text.splitlines()
    found = (line.rsplit(" ", 1) for line in lines if f'workflow_name="{workflow}"' in line)
    return {name: float(value) for name, value in found}


def test_functions_have_the_series_of_models(server: ServerProcess) -> None:
    war(
        server.store,
        "series",
        CHAIN.replace("max-batch-delay: 60000", "max-batch-delay: 100").replace(
            "timeout-ms: 5000", "timeout-ms: 60000"
        ),
    )
    assert register(server, "series.war").status == 200
    for _ in range(3):
        assert ask(server, "series", b"x").status == 200
    for path in ("series__before", "series__before/1.0"):
        assert server.request("inference", "POST", f"/predictions/{path}", body=b"x").status == 200
    names = ("ts_inference_requests_total", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds")
    # What is counted twice would be wrong in any sum: the process of the functions has none of these.
    functions = [("before", "1.0"), ("before", "default"), ("after", "default")]
    nodes = {*functions, ("m1", "default"), ("m2", "default")}

    def are_counted() -> bool:
        assert all(found.keys() == nodes for found in series(server, "series", *names))
        requests, *times = series(server, "series", *names)
        assert [requests[each] for each in functions] == [1, 4, 3]
        return all(found[each] > 0 for found in times for each in functions)

    eventually(are_counted, within=20)
    # A request without a worker is counted, too.
    assert server.request("management", "PUT", "/models/series__before?min_worker=0&max_worker=0").status == 202
    eventually(lambda: server.predict("series__before", b"x").status == 503, within=20, what="no worker")
    eventually(lambda: series(server, "series", names[0])[0]["before", "default"] > 4, within=20)
    assert series(server, "series", names[0])[0]["after", "default"] == 3
    assert server.request("management", "DELETE", "/workflows/series", timeout=60).status == 200
    # Its rows belong to others now, which begin with nothing.
    assert register(server, "series.war").status == 200
    assert not any(value for (name, _), value in series(server, "series", names[0])[0].items() if name == "before")
    assert server.request("management", "DELETE", "/workflows/series", timeout=60).status == 200


def series(server: ServerProcess, workflow: str, *names: str) -> list[dict[tuple[str, str], float]]:
    """Of each metric what its series of a workflow's nodes are at, by node and version."""
    text = server.request("metrics", "GET", "/metrics").text
    labels = rf'\{{model_name="{workflow}__(\w+)",model_version="([^"]+)",hostname="[^"]*",\}} (\S+)'
    return [
        {(node, version): float(value) for node, version, value in re.findall(f"{name}{labels}", text)}
        for name in names
    ]


# Management


def test_list_and_describe(server: ServerProcess) -> None:
    [described] = server.request("management", "GET", "/workflows/chain/ignored").json()
    assert described == {
        "workflowName": "chain",
        "workflowUrl": "chain.war",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 3,
        "maxBatchDelay": 60000,
        "workflowDag": "{before=[m1], m1=[m2], m2=[after]}",
        "longestMs": 80_000,
    }
    page = server.request("management", "GET", "/workflows?limit=2").json()
    assert page == {
        "nextPageToken": "2",
        "workflows": [
            {"workflowName": "chain", "workflowUrl": "chain.war"},
            {"workflowName": "diamond", "workflowUrl": "diamond.war"},
        ],
    }
    everything = server.request("management", "GET", "/workflows?limit=-1&next_page_token=-3").json()
    assert [each["workflowName"] for each in everything["workflows"]] == [
        *("chain", "diamond", "ends", "hasty", "late", "mood", "row", "stalled")
    ]


def test_the_status_for_people_lists_them(server: ServerProcess) -> None:
    lines = list(format_state(server.control.call("status")))
    head, *rows = lines[lines.index("workflows") + 1 :]
    assert head.split()[:3] == ["workflow", "url", "nodes"]
    assert "longest ms" in head
    (hasty,) = [row.split() for row in rows if row.split()[:1] == ["hasty"]]
    assert hasty == ["hasty", "hasty.war", "1", "1", "0", "0", "400", "yes", "-"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("PUT", "/workflows", 405, "MethodNotAllowedException"),
        ("DELETE", "/workflows", 405, "MethodNotAllowedException"),
        ("PUT", "/workflows/chain", 405, "MethodNotAllowedException"),
        ("POST", "/workflows/chain", 405, "MethodNotAllowedException"),
        ("GET", "/workflows/a/b/c", 404, "ResourceNotFoundException"),
        ("GET", "/workflows/nope", 404, "WorkflowNotFoundException"),
        ("DELETE", "/workflows/nope", 404, "WorkflowNotFoundException"),
    ],
)
def test_other_calls(server: ServerProcess, method: str, path: str, status: int, kind: str) -> None:
    assert said(server.request("management", method, path, body=b""))[:2] == (status, kind)


@pytest.mark.parametrize(
    ("query", "status", "kind", "message"),
    [
        ("", 400, "BadRequestException", "Parameter url is required."),
        ("?url=../x.war", 404, "WorkflowNotFoundException", "Relative path is not allowed in url: ../x.war"),
        (f"?url={'y' * 300}", 404, "WorkflowNotFoundException", f"Workflow not found in workflow store: {'y' * 300}"),
        ("?url=no.war", 404, "WorkflowNotFoundException", "Workflow not found in workflow store: no.war"),
        ("?url=", 404, "WorkflowNotFoundException", "Workflow not found at: "),
        (
            "?url=ftp://x/y.war",
            404,
            "WorkflowNotFoundException",
            "Workflow not found in workflow store: ftp://x/y.war",
        ),
        ("?url=chain.war", 409, "ConflictStatusException", "Workflow chain is already registered."),
        ("?url=http://127.0.0.1:9/x.war", 400, "DownloadArchiveException", None),
    ],
)
def test_what_cannot_be_registered(
    server: ServerProcess, query: str, status: int, kind: str, message: str | None
) -> None:
    found = said(server.request("management", "POST", f"/workflows{query}", body=b""))
    assert found[:2] == (status, kind)
    assert message is None or found[2] == message


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"workflow": None, "createdOn": "x", "archiverVersion": "1"}, "Missing Workflow entry in manifest file."),
        ({"workflow": {"specFile": "s"}, "createdOn": "x", "archiverVersion": "1"}, "Workflow name is not defined."),
        (
            {"workflow": {"workflowName": "w", "specFile": "s"}, "createdOn": "x"},
            "Workflow archive version is not defined.",
        ),
        (
            {"workflow": {"workflowName": "w", "specFile": "s"}, "archiverVersion": "1"},
            "Workflow archive createdOn is not defined.",
        ),
        ({}, "Workflow name is not defined."),
    ],
)
def test_manifests_that_miss_something(server: ServerProcess, manifest: dict[str, object], message: str) -> None:
    war(server.store, "lame", CHAIN, manifest=manifest)
    assert said(register(server, "lame.war")) == (500, "InvalidWorkflowException", message)


@pytest.mark.parametrize(
    ("dag", "message"),
    [
        ("before: [before]", "Self loop exception"),
        ("before: [after, after]", "loop exception"),
        ("before: [after]\n  after: [before]", "DAG should have only one start node"),
        ("before: [m1]\n  m1: [m2]\n  m2: [m1]", "Not a valid DAG"),
        ("before: []\n  after: []", "DAG should have only one start node"),
        ("before: after", "spec.yaml:6: key dag.before: 'after' is not a list of nodes: write [after]"),
    ],
)
def test_graphs_that_are_none(server: ServerProcess, dag: str, message: str) -> None:
    text = f"models:\n  m1: {{url: named.mar}}\n  m2:\n    url: named.mar\ndag:\n  {dag}\n"
    war(server.store, "knot", text)
    before = models(server)
    assert said(register(server, "knot.war")) == (400, "InvalidDAGException", message)
    assert models(server) == before


def test_no_node_of_a_workflow_that_fails_stays(server: ServerProcess) -> None:
    text = "models:\n  ok: {url: named.mar}\n  bad: {url: broken.mar}\n  gone: {url: gone.mar}\n"
    war(server.store, "torn", text + "dag:\n  before: [ok, bad, gone]\n")
    before = models(server)
    assert said(register(server, "torn.war")) == (
        500,
        "WorkflowException",
        "Workflow torn has failed to register. Failures: [Failed to start workers for model torn__bad version: 1.0, "
        "Workflow Node torn__gone failed to register. Details: Model not found at: gone.mar]",
    )
    assert models(server) == before
    assert server.request("management", "GET", "/models/torn__before").status == 404
    assert said(ask(server, "torn", b"x"))[0] == 404


def test_a_node_whose_name_is_taken(server: ServerProcess) -> None:
    war(server.store, "w", "models: {m: {url: named.mar}}\ndag: {before: [m]}\n")
    assert server.register("named.mar", model_name="w__m").status == 200
    status, kind, message = said(register(server, "w.war"))
    assert (status, kind) == (500, "WorkflowException")
    assert "Details: Model version 1.0 is already registered for model w__m" in message
    assert server.predict("w__m", b"x").text == "x w__m", "the other model stays"
    assert server.request("management", "GET", "/models/w__before").status == 404
    assert server.request("management", "DELETE", "/models/w__m").status == 200


def test_any_name_is_free_for_nodes_and_models(server: ServerProcess) -> None:
    """The process of a workflow's functions is a model as well, but has no name that anybody may want."""
    functions = "def functions(data, context):\n    return data and [bytes(data[0]['body']) + b' function']\n"
    war(server.store, "w", "models: {functions: {url: named.mar}}\ndag: {before: [functions]}\n")
    war(server.store, "v", "models: {}\ndag: {functions: []}\n", functions)
    for name, answer in (("w", "x before w__functions"), ("v", "x function")):
        for replace in ("false", "true"):
            reply = register(server, f"{name}.war", replace=replace)
            assert reply.status == 200, reply.text
            assert ask(server, name, b"x").text == answer
        assert server.request("management", "DELETE", f"/workflows/{name}", timeout=60).status == 200
    assert server.register("named.mar", model_name="u__functions").status == 200
    war(server.store, "u", "models: {}\ndag: {before: [after]}\n")
    for replace in ("false", "true"):
        assert register(server, "u.war", replace=replace).status == 200
        assert ask(server, "u", b"x").text == "x before after"
    assert server.request("management", "DELETE", "/workflows/u", timeout=60).status == 200
    assert server.predict("u__functions", b"x").text == "x u__functions"
    assert server.request("management", "DELETE", "/models/u__functions").status == 200


def test_a_function_that_the_handler_lacks(server: ServerProcess) -> None:
    war(server.store, "lacking", "models: {}\ndag:\n  before: [missing]\n")
    assert said(register(server, "lacking.war"))[2] == (
        "Workflow lacking has failed to register. "
        "Failures: [Failed to start workers for model lacking__missing version: 1.0]"
    )


def test_a_function_that_is_missing_falls_back_to_the_only_class(server: ServerProcess) -> None:
    source = "class Only:\n    def handle(self, data, context):\n        return [b'class ' + bytes(data[0]['body'])]\n"
    war(server.store, "classy", "models: {}\ndag:\n  whatever: []\n", source)
    assert register(server, "classy.war").status == 200
    assert ask(server, "classy", b"x").text == "class x"
    assert server.request("management", "DELETE", "/workflows/classy").status == 200


def test_registered_by_json_under_another_name_and_unregistered(server: ServerProcess) -> None:
    body = json.dumps({"url": "chain.war", "workflow_name": "other", "response_timeout": 7})
    headers = {"content-type": "application/json"}
    reply = server.request("management", "POST", "/workflows", body=body, headers=headers, timeout=90)
    assert reply.json() == {"status": "Workflow other has been registered and scaled successfully."}
    [described] = server.request("management", "GET", "/models/other__m1").json()
    assert described["responseTimeout"] == 7
    assert ask(server, "other", b"x").text == "x before other__m1 other__m2 after"
    reply = server.request("management", "DELETE", "/workflows/other", timeout=60)
    assert reply.json() == {"status": 'Workflow "other" unregistered'}
    assert not [name for name in models(server) if name.startswith("other__")]
    assert said(ask(server, "other", b"x"))[0] == 404
    assert (server.store / "chain.war").exists()


def test_an_archive_that_was_fetched_goes_with_its_workflow(server: ServerProcess, tmp_path: Path) -> None:
    war(tmp_path, "far", CHAIN)
    handler = type("Files", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path)))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{files.server_address[1]}/far.war"
        assert register(server, url).status == 200
        assert (server.store / "far.war").exists()
        assert said(register(server, url))[:3] == (500, "FileAlreadyExistsException", "far.war")
        assert server.request("management", "DELETE", "/workflows/far", timeout=60).status == 200
        assert not (server.store / "far.war").exists()
    finally:
        files.shutdown()
        files.server_close()
