"""What a running server keeps of slow and failed requests, and tells of them."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import GrpcClient
from support.http import Reply
from support.server import ServerProcess
from support.wars import NAMED, war

from wsgi_ts.cli.commands import wsgi_ts

#: Its stages take 20, 40 and 10 ms.
STAGES = """
import time
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        self.initialized = True
    def preprocess(self, data):
        time.sleep(0.02)
        return data
    def inference(self, data):
        time.sleep(0.04)
        return data
    def postprocess(self, data):
        time.sleep(0.01)
        return [bytes(row.get("body") or row.get("data")) for row in data]
"""
ECHO = "def handle(data, context):\n    return data and [bytes(row['body']) for row in data]\n"
#: Sleeps as long as the body says, or until the file is there that it names.
SLEEPS = """
import os, time
def handle(data, context):
    for row in data or []:
        wish = bytes(row["body"])
        if not wish.startswith(b"/"):
            time.sleep(float(wish))
        ends_at = time.monotonic() + 100
        while wish.startswith(b"/") and not os.path.exists(wish) and time.monotonic() < ends_at:
            time.sleep(0.005)
    return data and ["slept"] * len(data)
"""
RAISES = "def handle(data, context):\n    if data:\n        raise ValueError('not today')\n"
DIES = "import os\ndef handle(data, context):\n    if data:\n        os._exit(3)\n"
CHUNKS = """
from ts.handler_utils.utils import send_intermediate_predict_response
import time
def handle(data, context):
    if data:
        send_intermediate_predict_response(["one"], context.request_ids, "Intermediate", 200, context)
        time.sleep(0.1)
        return ["two"] * len(data)
"""
CHAIN = """
models:
  middle: {url: named.mar}
dag:
  before: [middle]
  middle: [after]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "stages", STAGES)
    archive(store, "echo", ECHO)
    archive(store, "raises", RAISES)
    archive(store, "chunks", CHUNKS)
    archive(store, "sleeps", SLEEPS, config_yaml="clientTimeoutInMills: 6000")
    fixed = "batchPolicy: fixed\nbatchSize: {}\nmaxBatchDelay: {}"
    archive(store, "batched", SLEEPS, config_yaml=fixed.format(4, 100_000))
    archive(store, "delayed", SLEEPS, config_yaml=fixed.format(4, 200))
    archive(store, "dies", DIES, config_yaml=fixed.format(2, 100_000))
    archive(store, "named", NAMED)
    war(store, "chain", CHAIN)
    config = {"preload_modules": "torch", "server_timing": "true"}
    with ServerProcess(store=store, config=config, arguments=["--log-format", "json"]) as running:
        for name in ("stages", "echo", "raises", "chunks", "sleeps", "batched", "delayed", "dies"):
            assert running.register(f"{name}.mar").status == 200
        assert running.request("management", "POST", "/workflows?url=chain.war", timeout=60).status == 200
        yield running


def listed(server: ServerProcess, query: str = "") -> list[dict[str, Any]]:
    reply = server.request("management", "GET", f"/debug/traces{query}")
    assert reply.status == 200
    traces: list[dict[str, Any]] = json.loads(reply.body)["traces"]
    return traces


def kept(server: ServerProcess, reply: Reply) -> dict[str, Any]:
    """What is kept of an answered request: its record comes a moment after the answer."""
    path = f"/debug/traces/{reply.headers['x-request-id']}"
    eventually(lambda: server.request("management", "GET", path).status == 200, within=20, what="the record")
    record: dict[str, Any] = json.loads(server.request("management", "GET", path).body)
    return record


def spans(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {span["name"]: span for span in record["spans"]}


def explain(server: ServerProcess, *words: str) -> tuple[int, str]:
    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complained):
        status = wsgi_ts(["explain", *words, "--run-dir", str(server.run_dir)])
    return status, said.getvalue() + complained.getvalue()


def test_a_slow_request_tells_when_it_came_and_where_its_time_went(server: ServerProcess) -> None:
    before = time.time()
    record = kept(server, server.predict("stages", b"x"))
    assert before - 0.01 <= record["started"] <= time.time()
    assert (record["model"], record["version"], record["status"], record["error"]) == ("stages", "1.0", 200, None)
    assert (record["protocol"], record["method"], record["path"]) == ("http", "POST", "/predictions/stages")
    assert (record["kept_because"], record["batch_size"], record["trace_id"]) == ("slow", 1, None)
    found = spans(record)
    assert {"receive", "queue", "batch", "preprocess", "inference", "postprocess", "respond"} <= set(found)
    # Each stage sleeps, so these are least times; their order is what matters.
    assert found["preprocess"]["duration_ms"] >= 20
    assert found["inference"]["duration_ms"] >= 40
    assert found["postprocess"]["duration_ms"] >= 10
    starts = [found[name]["start_ms"] for name in ("receive", "queue", "batch", "preprocess", "inference", "respond")]
    assert starts == sorted(starts)
    batch = found["batch"]
    assert batch["start_ms"] + batch["duration_ms"] <= record["duration_ms"] + 0.01
    assert batch["attributes"]["worker"] == record["worker"]


def test_those_of_a_batch_know_each_other_and_why_it_went(server: ServerProcess) -> None:
    with ThreadPoolExecutor(4) as clients:
        replies = list(clients.map(lambda _: server.predict("batched", b"0.1"), range(4)))
    records = [kept(server, reply) for reply in replies]
    full = [record for record in records if record["batch_size"] == 4]
    assert len(full) == 4
    assert {record["batch_close_reason"] for record in full} == {"full"}
    ids = {reply.headers["x-request-id"] for reply in replies}
    own = records[0]["request_id"]
    eventually(lambda: "  with " in explain(server, own)[1], within=20, what="the batch's record")
    status, text = explain(server, own)
    assert status == 0
    assert {line.split()[1] for line in text.splitlines() if line.startswith("  with ")} == ids - {own}
    assert "with 3 others; it went because it was full (full)" in text
    alone = kept(server, server.predict("delayed", b"0.1"))
    assert (alone["batch_size"], alone["batch_close_reason"]) == (1, "delay")


def test_a_failed_request_tells_what_its_handler_raised(server: ServerProcess) -> None:
    reply = server.predict("raises", b"x")
    assert reply.status == 503
    record = kept(server, reply)
    assert (record["kept_because"], record["status"], record["error"]) == ("failed", 503, "Prediction failed")
    own = record["request_id"]
    eventually(lambda: "not today" in explain(server, own)[1], within=20, what="the batch's record")
    text = explain(server, own)[1]
    assert "the handler raised ValueError: not today" in text
    assert "kept because it failed" in text
    assert own in [each["request_id"] for each in listed(server, "?status=failed&model=raises")]
    assert own not in [each["request_id"] for each in listed(server, "?status=slow")]


def test_one_that_was_refused_or_came_too_late_is_kept_too(server: ServerProcess, tmp_path: Path) -> None:
    absent = server.predict("absent", b"x")
    assert absent.status == 404
    assert kept(server, absent)["error"] == "Model not found: absent"
    late = server.predict("sleeps", f"{tmp_path}/gate")
    (tmp_path / "gate").touch()
    assert late.status == 408
    record = kept(server, late)
    assert [span["name"] for span in record["spans"]] == ["receive", "wait"]
    assert spans(record)["wait"]["attributes"] == {"state": "running"}
    assert record["batch_size"] is None
    assert "a worker was running it" in explain(server, record["request_id"])[1]


def pending(server: ServerProcess, model: str) -> int:
    (described,) = server.request("management", "GET", f"/models/{model}").json()
    return int(described["jobQueueStatus"]["pendingRequests"])


def test_one_whose_client_has_gone_is_kept_too(server: ServerProcess) -> None:
    with server.raw() as connection:
        connection.send(b"POST /predictions/batched HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n0.1")
        eventually(lambda: pending(server, "batched") == 1, within=20, what="a request in the queue")
    eventually(lambda: any(each["status"] == 499 for each in listed(server)), within=20, what="the record")
    record = next(each for each in listed(server) if each["status"] == 499)
    assert (record["model"], record["error"]) == ("batched", "Client closed the connection")
    assert spans(record)["wait"]["attributes"] == {"state": "queued"}


def test_those_that_a_worker_has_died_with_know_each_other(server: ServerProcess) -> None:
    with ThreadPoolExecutor(2) as clients:
        replies = list(clients.map(lambda _: server.predict("dies", b"x"), range(2)))
    assert [reply.status for reply in replies] == [500, 500]
    first, second = (kept(server, reply) for reply in replies)
    assert (first["error"], first["batch_size"], first["batch_close_reason"]) == ("Worker died.", 2, "full")
    assert first["worker"] == second["worker"]
    other = f"  with {second['request_id']}"
    eventually(lambda: other in explain(server, first["request_id"])[1], within=20, what="the batch's record")
    said = explain(server, first["request_id"])[1]
    assert f"of worker {first['worker']}: with 1 other; it went because it was full" in said


def test_a_streamed_answer_counts_to_its_end(server: ServerProcess) -> None:
    reply = server.predict("chunks", b"x")
    assert reply.body == b"onetwo"
    assert kept(server, reply)["duration_ms"] >= 100


def test_a_workflow_tells_of_its_nodes(server: ServerProcess) -> None:
    reply = server.request("inference", "POST", "/wfpredict/chain", body=b"x")
    assert reply.body == b"x before chain__middle after"
    record = kept(server, reply)
    assert (record["protocol"], record["model"], record["version"]) == ("workflow", "chain", None)
    nodes = [span["name"] for span in record["spans"] if span["name"].startswith("node ")]
    assert nodes == ["node before", "node middle", "node after"]
    inner = [span for span in record["spans"] if span["attributes"].get("node") == "middle"]
    assert {"queue", "batch", "inference"} <= {span["name"] for span in inner}
    assert "node middle" in explain(server, record["request_id"])[1]


def test_grpc_predictions_are_kept(server: ServerProcess) -> None:
    with GrpcClient(server) as client:
        client.predict("stages", b"x")
    eventually(
        lambda: any(each["protocol"] == "grpc" for each in listed(server, "?model=stages")), within=20, what="it"
    )
    record = next(each for each in listed(server, "?model=stages") if each["protocol"] == "grpc")
    assert record["path"].endswith("InferenceAPIsService/Predictions")
    assert spans(record)["inference"]["duration_ms"] >= 40


def timings(reply: Reply) -> dict[str, float]:
    """The parts of a Server-Timing header, in milliseconds."""
    parts = [part.split(";dur=") for part in reply.headers["server-timing"].split(", ")]
    return {name: float(value) for name, value in parts}


def test_an_answer_tells_where_its_time_went(server: ServerProcess) -> None:
    found = timings(server.predict("stages", b"x"))
    assert list(found) == ["queue", "handover", "worker", "preprocess", "inference", "postprocess"]
    assert found["inference"] >= 40
    assert found["worker"] >= found["preprocess"] + found["inference"] + found["postprocess"]
    assert timings(server.predict("raises", b"x"))["worker"] > 0
    assert "inference" not in timings(server.predict("chunks", b"x"))  # they are sent before that is known
    assert list(timings(server.request("inference", "POST", "/wfpredict/chain", body=b"x"))) == [
        *("before", "middle", "after"),
    ]
    assert "server-timing" not in server.request("inference", "GET", "/ping").headers


def log_line(server: ServerProcess, wanted: str) -> dict[str, Any]:
    """The last line of the access log with this text."""

    def lines() -> list[str]:
        return [line for line in server.log("access_log.log").splitlines() if wanted in line]

    eventually(lambda: bool(lines()), within=20, what="the line")
    line: dict[str, Any] = json.loads(lines()[-1])
    return line


def test_the_access_log_has_one_json_object_for_each_request(server: ServerProcess) -> None:
    reply = server.predict("stages", b"x")
    line = log_line(server, reply.headers["x-request-id"])
    assert (line["http.request.method"], line["url.path"], line["http.response.status_code"]) == (
        *("POST", "/predictions/stages"),
        200,
    )
    assert (line["model"], line["batch_size"], line["client.address"]) == ("stages", 1, "127.0.0.1")
    assert line["infer_ms"] >= 70
    assert line["duration_ms"] >= line["infer_ms"] + line["queue_ms"] - 0.01
    assert "trace_id" not in line
    failed = log_line(server, server.predict("raises", b"x").headers["x-request-id"])
    assert (failed["http.response.status_code"], failed["error.message"]) == (503, "Prediction failed")
    assert server.request("inference", "GET", "/ping").status == 200
    assert log_line(server, '"/ping"')["http.request.method"] == "GET"
    with GrpcClient(server) as client:
        client.predict("stages", b"x")
    called = log_line(server, "InferenceAPIsService/Predictions")
    assert (called["rpc.system.name"], called["rpc.response.status_code"]) == ("grpc", "OK")
    assert (called["model"], called["batch_size"]) == ("stages", 1)
    assert all(json.loads(each) for each in server.log("access_log.log").splitlines())


def test_the_list_is_newest_first_and_as_long_as_asked_for(server: ServerProcess) -> None:
    for _ in range(3):
        kept(server, server.predict("raises", b"x"))
    found = listed(server, "?limit=2")
    assert len(found) == 2
    assert found[0]["started"] >= found[1]["started"]
    assert server.request("management", "GET", "/debug/traces?status=quick").status == 400


def test_only_the_slowest_of_a_minute_are_kept(server: ServerProcess) -> None:
    for _ in range(40):
        server.predict("echo", b"x")
    eventually(lambda: len(listed(server, "?model=echo&limit=100")) >= 10, within=20, what="ten records")
    # Ten, and those that were among the first ten when they came.
    assert len(listed(server, "?model=echo&limit=100")) < 40


def test_of_others_nothing_is_known(server: ServerProcess) -> None:
    assert server.request("management", "GET", "/debug/traces/none").status == 404
    status, text = explain(server, "none")
    assert status == 1
    assert text.startswith("Nothing is kept of request none")
