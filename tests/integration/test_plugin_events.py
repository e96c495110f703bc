"""Events, a veto, metric sinks, fetchers and a store for snapshots in real servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from support.archives import archive
from support.eventually import eventually
from support.wars import war

from wsgi_ts.plugins.testing import PluginServer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "plugins"
PLUGINS = """
import json, os, shutil, time
from wsgi_ts.plugins import Veto, plugin

def note(**what):
    with open("events.jsonl", "a") as file:
        file.write(json.dumps(what) + chr(10))

@plugin("events")
class Listener:
    def server_started(self, addresses):
        note(event="server_started", apis=sorted(addresses))

    def server_stopping(self):
        note(event="server_stopping")

    def model_registering(self, name, url):
        if name.startswith("bad"):
            raise Veto("its name is bad")
        if name.startswith("odd"):
            raise KeyError("odd")

    def model_registered(self, name, **more):
        note(event="model_registered", name=name, version=more["version"])

    def model_unregistered(self, name, version):
        note(event="model_unregistered", name=name)

    def model_ready(self, name):
        note(event="model_ready", name=name)

    def model_unready(self, name):
        note(event="model_unready", name=name)

    def worker_died(self, reason, pid_is_not_told=None):
        note(event="worker_died", reason=reason)

    def request_finished(self, records):
        for record in records:
            note(event="request_finished", **record)
    sample = 1.0

@plugin("events")
class Raises:
    def model_registered(self):
        raise ValueError("not interested")

@plugin("metrics")
class Sink:
    interval_s = 0.2
    def emit(self, samples):
        by_name = {each.name: each.value for each in samples}
        with open("sink.json.new", "w") as file:
            json.dump({"names": sorted(by_name), "ready": by_name["wsgi_ts_workers_ready"]}, file)
        os.replace("sink.json.new", "sink.json")

@plugin("fetch", name="store")
class Store:
    scheme = "box"

    def open(self, url, dest):
        shutil.copy(os.path.join(os.environ["BOX"], url.rpartition("/")[2]), dest)

    def verify(self, path, url):
        if b"forged" in open(path, "rb").read():
            raise ValueError("the signature is wrong")
"""

#: Its model comes from the same place as the archive.
FLOW = """
models:
  middle: {url: "box://shelf/node.mar"}
dag:
  before: [middle]
  middle: [after]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginServer]:
    home = tmp_path_factory.mktemp("events")
    (home / "listeners.py").write_text(dedent(PLUGINS))
    box = home / "box"
    box.mkdir()
    archive(box, "boxed")
    archive(box, "node")
    archive(box, "forged", files={"forged.txt": "forged"})
    war(box, "flow", FLOW)
    war(box, "forged_flow", FLOW, files={"forged.txt": "forged"})
    server = PluginServer(home / "server", home / "listeners.py", environment={"BOX": str(box)})
    server.start()
    yield server
    server.stop()


def events(server: PluginServer) -> list[dict[str, Any]]:
    file = server.home / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def happened(server: PluginServer, event: str, **what: str) -> bool:
    return any({**each, "event": event, **what} == each for each in events(server))


def register(server: PluginServer, url: str, name: str = "") -> Any:
    named = f"&model_name={name}" if name else ""
    return server.post(f"/models?url={url}{named}&initial_workers=1", api="management")


def test_life_of_server_and_model(server: PluginServer) -> None:
    assert register(server, "echo.mar", "other").status == 200
    for event, name in (("model_registered", "echo"), ("model_registered", "other"), ("model_ready", "other")):
        eventually(lambda e=event, n=name: happened(server, e, name=n), within=20, what=f"{event} {name}")  # type: ignore[misc]
    assert happened(server, "server_started", apis=["inference", "management", "metrics"])  # type: ignore[arg-type]
    described = server.get("/models/other", api="management").json()
    os.kill(described[0]["workers"][0]["pid"], signal.SIGKILL)
    eventually(lambda: happened(server, "worker_died"), within=20, what="worker_died")
    eventually(lambda: happened(server, "model_unready", name="other"), within=20, what="model_unready")
    assert server.request("DELETE", "/models/other", api="management").status == 200
    eventually(lambda: happened(server, "model_unregistered", name="other"), within=20, what="model_unregistered")


def test_a_veto(server: PluginServer) -> None:
    refused = register(server, "echo.mar", "bad_one")
    assert (refused.status, refused.json()["type"]) == (403, "ModelVetoedException")
    assert refused.json()["message"] == "Model bad_one may not be registered: its name is bad"
    assert server.get("/models/bad_one", api="management").status == 404
    assert register(server, "echo.mar", "odd_one").status == 200
    assert "KeyError: 'odd'; the model is registered" in server.output


def test_one_that_raises_is_counted_and_told_again(server: PluginServer) -> None:
    def errors() -> int:
        rows = server.get("/plugins", api="management").json()["plugins"]
        return next((int(row["errors"]) for row in rows if row["name"] == "Raises"), 0)

    eventually(lambda: errors() >= 1, within=20, what="count of failures")
    before = errors()
    register(server, "echo.mar", "once_more")
    eventually(lambda: errors() > before, within=20, what="another failure")


def test_finished_requests(server: PluginServer) -> None:
    server.post("/predictions/echo?number=1", b"x")
    server.get("/nothing")
    eventually(lambda: happened(server, "request_finished", model="echo"), within=20, what="a finished request")

    def unknown() -> list[dict[str, Any]]:
        return [each for each in events(server) if each.get("line", "").startswith("GET /nothing")]

    eventually(unknown, within=20, what="the other finished request")
    (record,) = unknown()
    assert record["status"] == 404 and record["took_ms"] >= 0 and len(record["request_id"]) == 36


def test_a_sink(server: PluginServer) -> None:
    file = server.home / "sink.json"
    eventually(lambda: file.exists() and json.loads(file.read_text())["ready"] >= 1, within=20, what="samples")
    names = json.loads(file.read_text())["names"]
    assert {"wsgi_ts_request_latency_seconds_count", "wsgi_ts_request_latency_seconds_sum"} < set(names)


def test_archives_of_another_scheme(server: PluginServer) -> None:
    assert register(server, "box://shelf/boxed.mar").status == 200
    assert server.post("/predictions/boxed", b"x").body == b"x"
    missing = register(server, "box://shelf/none.mar")
    assert (missing.status, missing.json()["type"]) == (400, "DownloadArchiveException")
    forged = register(server, "box://shelf/forged.mar")
    assert forged.status == 400 and "the signature is wrong" in server.output
    assert not list((server.home / "store").glob("*forged*"))
    assert register(server, "tape://shelf/nothing.mar").status == 404


def test_workflows_of_another_scheme(server: PluginServer) -> None:
    registered = server.post("/workflows?url=box://shelf/flow.war", api="management")
    assert registered.status == 200, registered.body
    assert server.post("/wfpredict/flow", b"x").body == b"x before after"
    described = server.get("/workflows/flow", api="management").json()[0]
    assert described["workflowUrl"] == "box://shelf/flow.war"
    missing = server.post("/workflows?url=box://shelf/none.war", api="management")
    assert (missing.status, missing.json()["type"]) == (400, "DownloadArchiveException")
    forged = server.post("/workflows?url=box://shelf/forged_flow.war", api="management")
    assert (forged.status, forged.json()["type"]) == (400, "DownloadArchiveException")
    # What was fetched goes with its workflow.
    assert (server.home / "store" / "flow.war").exists()
    assert server.request("DELETE", "/workflows/flow", api="management").status == 200
    assert not list((server.home / "store").glob("*.war"))


def test_the_last_events(server: PluginServer) -> None:
    server.stop()
    assert happened(server, "server_stopping")


def create_table() -> Any:
    keys = [("snapshotName", "HASH"), ("createdOn", "RANGE")]
    index = [("createdOnMonth", "HASH"), ("createdOn", "RANGE")]

    def schema(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
        return [{"AttributeName": name, "KeyType": kind} for name, kind in pairs]

    names = ("snapshotName", "createdOn", "createdOnMonth")
    return boto3.resource("dynamodb").create_table(
        TableName="Snapshots",
        KeySchema=schema(keys),
        AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in names],
        GlobalSecondaryIndexes=[
            {
                "IndexName": "createdOnMonth-index",
                "KeySchema": schema(index),
                "Projection": {"ProjectionType": "ALL"},
            }
        ],
        BillingMode="PAY_PER_REQUEST",
    )


@pytest.fixture
def dynamodb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A table, in a DynamoDB of this test's own."""
    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    variables = {
        **{"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"},
        **{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield create_table()
    moto.stop()


def test_snapshots_in_dynamodb(tmp_path: Path, dynamodb: Any) -> None:
    server = PluginServer(tmp_path / "server", EXAMPLES / "dynamodb_snapshot.py")
    with_snapshots = "--enable-model-api"
    server.start(with_snapshots)
    assert register(server, "echo.mar", "kept").status == 200
    assert server.stop() == 0
    items = dynamodb.scan()["Items"]
    assert len(items) >= 3 and {len(each["createdOnMonth"]) for each in items} == {7}
    assert not list((server.home / "logs" / "config").glob("*.cfg"))

    # Nothing of it is on this machine any more.
    shutil.rmtree(server.home / "logs")
    server.start(with_snapshots)
    assert "in the plugin's store" in server.output
    eventually(lambda: server.post("/predictions/kept", b"x").body == b"x", within=20, what="the restored model")

    # A store that fails costs no snapshot: it is written to a file then.
    dynamodb.delete()
    assert register(server, "echo.mar", "another").status == 200
    assert list((server.home / "logs" / "config").glob("*.cfg"))
    assert "the snapshot is written to a file" in server.output
    assert server.stop() == 0
