"""The management API of a whole server: register, describe, scale, versions, unregister, lists."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess

BAD_INIT = """
class Handler:
    def initialize(self, context):
        raise ValueError("cannot load")

    def handle(self, data, context):
        return [b"" for _ in data]
"""

WHO = """
import os

def handle(data, context):
    if data is None:
        return None
    return [context.manifest["model"]["modelVersion"] for _ in data]
"""

#: Answers once the file exists whose name the request brings.
WAITS = """
import os, time

def handle(data, context):
    if data is None:
        return None
    for row in data:
        while not os.path.exists(bytes(row["body"])):
            time.sleep(0.01)
    return ["served"] * len(data)
"""

CONFIGURED = """
minWorkers: 2
maxWorkers: 2
batchSize: 4
maxBatchDelay: 7
responseTimeout: 11
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "who", WHO, file_name="who1.mar")
    archive(store, "who", WHO, version="2.0", file_name="who2.mar")
    archive(store, "bad", BAD_INIT)
    archive(store, "who", BAD_INIT, version="3.0", file_name="bad2.mar")
    archive(store, "configured", config_yaml=CONFIGURED)
    archive(store, "waits", WAITS)
    (store / "junk.mar").write_bytes(b"no archive")
    with ServerProcess(store=store) as running:
        yield running


@pytest.fixture(autouse=True)
def no_models_left(server: ServerProcess) -> Iterator[None]:
    """Each test starts without models."""
    yield
    for model in manage(server, "GET", "/models").json()["models"]:
        name = quote(model["modelName"])
        versions = [entry["modelVersion"] for entry in manage(server, "GET", f"/models/{name}/all").json()]
        default = manage(server, "GET", f"/models/{name}").json()[0]["modelVersion"]
        # The default version can be removed only when it is the last one.
        for version in [other for other in versions if other != default] + [default]:
            reply = manage(server, "DELETE", f"/models/{name}/{version}")
            assert reply.status == 200, reply.text


def manage(server: ServerProcess, method: str, path: str, **more: Any) -> Reply:
    body = b"" if method in ("POST", "PUT") else None
    return server.request("management", method, path, **{"body": body, "timeout": 90, **more})


def describe(server: ServerProcess, path: str) -> dict[str, Any]:
    reply = manage(server, "GET", f"/models/{path}")
    assert reply.status == 200, reply.text
    described: list[dict[str, Any]] = reply.json()
    assert len(described) == 1
    return described[0]


def ready(server: ServerProcess, path: str) -> int:
    return sum(worker["status"] == "READY" for worker in describe(server, path)["workers"])


def assert_status(reply: Reply, status: int, text: str) -> None:
    assert (reply.status, reply.json()) == (status, {"status": text})


def assert_error(reply: Reply, status: int, kind: str, message: str | None = None) -> None:
    body = reply.json()
    assert (reply.status, body["code"], body["type"]) == (status, status, kind), body
    assert message is None or body["message"] == message
    assert list(body) == ["code", "type", "message"]


# Register


def test_registered_without_workers(server: ServerProcess) -> None:
    assert_status(
        manage(server, "POST", "/models?url=echo.mar"),
        200,
        'Model "echo" Version: 1.0 registered with 0 initial workers. '
        "Use scale workers API to add workers for the model.",
    )
    model = describe(server, "echo")
    assert (model["minWorkers"], model["maxWorkers"], model["workers"]) == (0, 0, [])
    reply = server.predict("echo", b"x")
    assert_error(reply, 503, "ServiceUnavailableException")
    assert reply.json()["message"].startswith('Model "echo" has no worker to serve inference request.')


def test_registered_with_workers_serves_at_once(server: ServerProcess) -> None:
    assert_status(
        server.register("echo.mar", initial_workers=2),
        200,
        'Model "echo" Version: 1.0 registered with 2 initial workers',
    )
    assert server.predict("echo", b"x").body == b"x"
    workers = describe(server, "echo")["workers"]
    assert [worker["status"] for worker in workers] == ["READY", "READY"]
    assert len({worker["id"] for worker in workers}) == 2
    for worker in workers:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", worker["startTime"])
        assert (worker["gpu"], worker["gpuUsage"]) == (False, "N/A")
    pids = {worker["pid"] for worker in workers}
    eventually(lambda: pids == {process.pid for process in server.processes("model-worker")}, within=20)


def test_registered_asynchronously(server: ServerProcess) -> None:
    reply = server.register("echo.mar", synchronous="false")
    assert reply.status in (200, 202)
    eventually(lambda: ready(server, "echo") == 1, within=30)
    assert server.predict("echo", b"x").body == b"x"


def test_registered_by_json_in_chunks(server: ServerProcess) -> None:
    chunks = [b'{"url": "echo.mar", ', b'"model_name": "parts"}']
    headers = {"content-type": "application/json"}
    reply = manage(server, "POST", "/models", headers=headers, body=None, chunks=chunks)
    assert reply.status == 200, reply.text
    assert describe(server, "parts")["modelUrl"] == "echo.mar"
    workflow = manage(server, "POST", "/workflows", headers=headers, body=None, chunks=[b'{"url": "nope.war"}'])
    assert_error(workflow, 404, "WorkflowNotFoundException", "Workflow not found in workflow store: nope.war")


def test_registered_by_json(server: ServerProcess) -> None:
    body = '{"url": "echo.mar", "model_name": "by json", "initial_workers": 1, "batch_size": "3"}'
    reply = manage(server, "POST", "/models", headers={"Content-Type": "application/json"}, body=body)
    assert_status(reply, 200, 'Model "by json" Version: 1.0 registered with 1 initial workers')
    assert describe(server, "by%20json")["batchSize"] == 3
    assert server.predict("by%20json", b"x").body == b"x"


def test_arguments_of_the_call(server: ServerProcess) -> None:
    reply = server.register(
        "echo.mar",
        model_name="named",
        initial_workers=0,
        batch_size=5,
        max_batch_delay=9,
        response_timeout=33,
        startup_timeout=44,
    )
    assert reply.status == 200, reply.text
    model = describe(server, "named")
    assert (model["batchSize"], model["maxBatchDelay"]) == (5, 9)
    assert (model["responseTimeout"], model["startupTimeout"]) == (33, 44)
    assert model["modelUrl"] == "echo.mar"


def test_configuration_in_the_archive(server: ServerProcess) -> None:
    reply = manage(server, "POST", "/models?url=configured.mar")
    assert_status(reply, 200, 'Model "configured" Version: 1.0 registered with 2 initial workers')
    model = describe(server, "configured")
    assert (model["minWorkers"], model["maxWorkers"], model["batchSize"]) == (2, 2, 4)
    assert (model["maxBatchDelay"], model["responseTimeout"]) == (7, 11)


@pytest.mark.parametrize(
    ("query", "status", "kind", "message"),
    [
        ("", 400, "BadRequestException", "Parameter url is required."),
        ("url=", 404, "ModelNotFoundException", "empty url"),
        ("url=nothere.mar", 404, "ModelNotFoundException", "Model not found at: nothere.mar"),
        (
            "url=../x.mar",
            404,
            "ModelNotFoundException",
            "Relative path is not allowed in url: ../x.mar",
        ),
        (
            "url=echo.mar&runtime=ruby",
            400,
            "BadRequestException",
            "Invalid RuntimeType value: ruby",
        ),
        ("url=junk.mar", 400, "InvalidModelException", None),
        ("url=echo.mar&model_name=a/b", 400, "BadRequestException", None),
    ],
)
def test_refused_registrations(server: ServerProcess, query: str, status: int, kind: str, message: str | None) -> None:
    assert_error(manage(server, "POST", f"/models?{query}"), status, kind, message)
    assert manage(server, "GET", "/models").json() == {"models": []}


def test_registered_twice(server: ServerProcess) -> None:
    server.register("echo.mar")
    reply = server.register("echo.mar")
    assert_error(reply, 409, "ConflictStatusException", "Model version 1.0 is already registered for model echo")
    assert server.predict("echo", b"x").body == b"x"


def test_model_that_cannot_start_stays_without_workers(server: ServerProcess) -> None:
    failed = "Failed to start workers for model bad version: 1.0"
    assert_error(server.register("bad.mar", initial_workers=2), 500, "InternalServerException", failed)
    model = describe(server, "bad")
    assert (model["minWorkers"], model["maxWorkers"], model["workers"]) == (0, 0, [])
    eventually(lambda: not server.processes("model-worker"), within=20, what="end of the workers that failed")
    assert server.request("inference", "GET", "/ping").status == 200
    assert server.predict("bad").status == 503
    known = "Model version 1.0 is already registered for model bad"
    assert_error(server.register("bad.mar"), 409, "ConflictStatusException", known)
    again = manage(server, "PUT", "/models/bad?min_worker=1&synchronous=true")
    assert_error(again, 500, "InternalServerException", failed.replace("1.0", "null"))
    # Its worker is there now, and being started again: nothing new has to be started, and nothing is ready.
    for path in ("bad?min_worker=1&synchronous=true", "bad/1.0?min_worker=1&max_worker=2&synchronous=true"):
        assert_status(manage(server, "PUT", f"/models/{path}"), 206, "Workers scaling in progress...")
    assert_status(
        manage(server, "PUT", "/models/bad?min_worker=0&synchronous=true"), 200, "Workers scaled to 0 for model: bad"
    )
    assert manage(server, "DELETE", "/models/bad").status == 200
    assert manage(server, "GET", "/models/bad").status == 404


def test_version_that_cannot_start_beside_one_that_can(server: ServerProcess) -> None:
    assert server.register("who1.mar").status == 200
    assert server.register("bad2.mar").status == 500
    (one, two) = manage(server, "GET", "/models/who/all").json()
    assert (one["modelVersion"], len(one["workers"])) == ("1.0", 1)
    assert (two["modelVersion"], two["workers"]) == ("3.0", [])
    assert server.predict("who").body == b"1.0"
    assert manage(server, "DELETE", "/models/who/3.0").status == 200


# Scale


def test_scale_up_and_down(server: ServerProcess) -> None:
    server.register("echo.mar")
    first = describe(server, "echo")["workers"][0]
    reply = manage(server, "PUT", "/models/echo?min_worker=3&synchronous=true")
    assert_status(reply, 200, "Workers scaled to 3 for model: echo")
    workers = describe(server, "echo")["workers"]
    assert [worker["status"] for worker in workers] == ["READY"] * 3
    assert workers[0]["pid"] == first["pid"]
    reply = manage(server, "PUT", "/models/echo/1.0?min_worker=1&max_worker=1&synchronous=true")
    assert_status(reply, 200, "Workers scaled to 1 for model: echo, version: 1.0")
    model = describe(server, "echo")
    assert [worker["pid"] for worker in model["workers"]] == [first["pid"]]
    assert (model["minWorkers"], model["maxWorkers"]) == (1, 1)
    eventually(lambda: len(server.processes("model-worker")) == 1, within=10, what="end of two workers")


def test_scale_is_asynchronous_unless_told(server: ServerProcess) -> None:
    server.register("echo.mar")
    assert_status(manage(server, "PUT", "/models/echo?min_worker=2"), 202, "Processing worker updates...")
    eventually(lambda: ready(server, "echo") == 2, within=30)


def test_scale_to_nothing_and_back(server: ServerProcess) -> None:
    server.register("echo.mar")
    manage(server, "PUT", "/models/echo?min_worker=0&synchronous=true")
    assert describe(server, "echo")["workers"] == []
    assert_error(server.predict("echo", b"x"), 503, "ServiceUnavailableException")
    manage(server, "PUT", "/models/echo?min_worker=1&synchronous=true")
    assert server.predict("echo", b"x").body == b"x"


def test_what_waits_is_served_before_the_last_workers_leave(server: ServerProcess, tmp_path: Path) -> None:
    server.register("waits.mar", initial_workers=2)
    go = tmp_path / "go"
    with ThreadPoolExecutor(6) as threads:
        replies = [threads.submit(server.predict, "waits", os.fspath(go)) for _ in range(5)]
        try:
            eventually(lambda: describe(server, "waits")["jobQueueStatus"]["pendingRequests"] == 3, within=30)
            path = "/models/waits?min_worker=0&max_worker=0&synchronous=true"
            scaled = threads.submit(manage, server, "PUT", path)
            eventually(lambda: describe(server, "waits")["maxWorkers"] == 0, within=30)
        finally:
            go.touch()
        assert [reply.result().text for reply in replies] == ["served"] * 5
        assert_status(scaled.result(), 200, "Workers scaled to 0 for model: waits")
    assert describe(server, "waits")["workers"] == []


@pytest.mark.parametrize(
    ("path", "status", "kind", "message"),
    [
        ("echo?min_worker=3&max_worker=1", 400, "BadRequestException", "max_worker cannot be less than min_worker."),
        ("echo?max_worker=-1", 400, "BadRequestException", "max_worker cannot be less than min_worker."),
        ("echo?min_worker=-2", 400, "BadRequestException", None),
        ("nope?min_worker=1", 404, "ModelNotFoundException", "Model not found: nope"),
        # Which of two mistakes the client is told of is TorchServe's choice.
        ("nope?min_worker=3&max_worker=1", 400, "BadRequestException", "max_worker cannot be less than min_worker."),
        ("nope?min_worker=-2", 404, "ModelNotFoundException", "Model not found: nope"),
        (
            "echo/9?min_worker=-2",
            404,
            "ModelVersionNotFoundException",
            "Model version: 9 does not exist for model: echo",
        ),
        (
            "echo/9?min_worker=1",
            404,
            "ModelVersionNotFoundException",
            "Model version: 9 does not exist for model: echo",
        ),
        (
            "echo?min_worker=1&model_version=8",
            404,
            "ModelVersionNotFoundException",
            "Model version: 8 does not exist for model: echo",
        ),
    ],
)
def test_refused_scalings(server: ServerProcess, path: str, status: int, kind: str, message: str | None) -> None:
    server.register("echo.mar")
    assert_error(manage(server, "PUT", f"/models/{path}"), status, kind, message)
    assert ready(server, "echo") == 1


def test_no_request_fails_while_workers_come_and_go(server: ServerProcess) -> None:
    server.register("echo.mar", initial_workers=2)
    stop = threading.Event()
    failures: list[str] = []
    answered: list[int] = []

    def client(number: int) -> None:
        count = 0
        while not stop.is_set():
            body = b"%d-%d" % (number, count)
            reply = server.predict("echo", body)
            if (reply.status, reply.body) != (200, body):
                failures.append(f"{body!r}: {reply.status} {reply.text}")
            count += 1
        answered.append(count)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    try:
        for workers in (1, 3, 1, 2):
            reply = manage(server, "PUT", f"/models/echo?min_worker={workers}&max_worker={workers}&synchronous=true")
            assert reply.status == 200, reply.text
    finally:
        stop.set()
        for thread in clients:
            thread.join(60)
    assert failures == []
    assert len(answered) == 4 and min(answered) > 0


# Versions


def test_versions(server: ServerProcess) -> None:
    server.register("who1.mar")
    server.register("who2.mar")
    assert server.predict("who").text == "1.0"
    assert server.predict("who/2.0").text == "2.0"
    versions = manage(server, "GET", "/models/who/all").json()
    assert [entry["modelVersion"] for entry in versions] == ["1.0", "2.0"]
    assert_status(
        manage(server, "PUT", "/models/who/2.0/set-default"),
        200,
        'Default version successfully updated for model "who" to "2.0"',
    )
    assert server.predict("who").text == "2.0"
    assert server.predict("who/1.0").text == "1.0"
    assert_error(
        manage(server, "DELETE", "/models/who"),
        403,
        "InvalidModelVersionException",
        "Cannot remove default version for model who",
    )
    assert_status(manage(server, "DELETE", "/models/who/1.0"), 200, 'Model "who" unregistered')
    assert_error(
        server.predict("who/1.0"),
        404,
        "ModelVersionNotFoundException",
        "Model version: 1.0 does not exist for model: who",
    )
    assert server.predict("who").text == "2.0"


def test_set_default_of_what_is_not_there(server: ServerProcess) -> None:
    server.register("who1.mar", initial_workers=0)
    assert_error(
        manage(server, "PUT", "/models/nope/1.0/set-default"),
        404,
        "ModelNotFoundException",
        "Model not found: nope",
    )
    assert_error(
        manage(server, "PUT", "/models/who/9/set-default"),
        404,
        "ModelVersionNotFoundException",
        "Model version 9 does not exist for model who",
    )


# Unregister


def test_unregister_ends_workers_and_removes_files(server: ServerProcess) -> None:
    server.register("echo.mar", initial_workers=2)
    extracted = server.run_dir / "models"
    assert len(list(extracted.iterdir())) == 1
    assert_status(manage(server, "DELETE", "/models/echo?ignored=1"), 200, 'Model "echo" unregistered')
    assert_error(server.predict("echo", b"x"), 404, "ModelNotFoundException", "Model not found: echo")
    assert_error(manage(server, "DELETE", "/models/echo"), 404, "ModelNotFoundException")
    eventually(lambda: not server.processes("model-worker"), within=10, what="end of the workers")
    assert list(extracted.iterdir()) == []
    assert (server.store / "echo.mar").exists()
    assert server.register("echo.mar").status == 200
    assert server.predict("echo", b"again").body == b"again"


# Lists and the rest


def test_list_pages(server: ServerProcess) -> None:
    for name in ("c", "a", "b"):
        server.register("echo.mar", model_name=name, initial_workers=0)
    entries = [{"modelName": name, "modelUrl": "echo.mar"} for name in "abc"]
    assert manage(server, "GET", "/models").json() == {"models": entries}
    assert manage(server, "GET", "/models?limit=2").json() == {"nextPageToken": "2", "models": entries[:2]}
    page = manage(server, "GET", "/models?limit=2&next_page_token=2").json()
    assert page == {"models": entries[2:]}
    assert manage(server, "GET", "/models?limit=3").json() == {"nextPageToken": "3", "models": entries}
    assert manage(server, "GET", "/models?next_page_token=9").json() == {"models": []}


def test_kserve_readiness(server: ServerProcess) -> None:
    server.register("echo.mar", initial_workers=0)
    assert manage(server, "GET", "/v1/models/echo").json() == {"name": "echo", "ready": False}
    manage(server, "PUT", "/models/echo?min_worker=1&synchronous=true")
    assert manage(server, "GET", "/v1/models/echo").json() == {"name": "echo", "ready": True}
    assert_error(manage(server, "GET", "/v1/models/nope"), 404, "ModelNotFoundException")


def test_document_of_a_model(server: ServerProcess) -> None:
    server.register("echo.mar", initial_workers=0)
    document = manage(server, "OPTIONS", "/models/echo").json()
    assert document["info"]["title"] == "RESTful Management API for: echo"
    assert_error(manage(server, "OPTIONS", "/models/nope"), 404, "ModelNotFoundException")


def test_slow_management_call_holds_up_no_other(server: ServerProcess) -> None:
    """Calls wait in a thread pool: while one model loads, another one is described."""
    archive(
        server.store,
        "slow",
        """
        import os, time

        class Handler:
            def initialize(self, context):
                gate = os.path.join(os.environ["TMPDIR"], "gate")
                deadline = time.monotonic() + 100
                while not os.path.exists(gate) and time.monotonic() < deadline:
                    time.sleep(0.01)

            def handle(self, data, context):
                return [b"" for _ in data]
        """,
    )
    server.register("echo.mar")
    replies: list[Reply] = []
    loading = threading.Thread(target=lambda: replies.append(server.register("slow.mar")))
    loading.start()
    try:
        eventually(lambda: len(manage(server, "GET", "/models").json()["models"]) == 2, within=10)
        eventually(lambda: [each["status"] for each in describe(server, "slow")["workers"]] == ["UNLOADING"], within=10)
        assert manage(server, "PUT", "/models/echo?min_worker=2&synchronous=true").status == 200
        assert replies == []
    finally:
        (server.home / "tmp" / "gate").touch()
        loading.join(60)
    assert replies[0].status == 200, replies[0].text


def test_model_api_can_be_closed(start_server: Callable[..., ServerProcess], store: Path) -> None:
    archive(store, "echo")
    server = start_server(store=store, config={"enable_model_api": "false"}, arguments=["--models", "echo.mar"])
    for method, path in (("POST", "/models?url=echo.mar"), ("DELETE", "/models/echo")):
        assert_error(manage(server, method, path), 405, "MethodNotAllowedException")
    assert manage(server, "PUT", "/models/echo?min_worker=1&synchronous=true").status == 200
    assert server.predict("echo", b"x").body == b"x"


def test_combined_address(start_server: Callable[..., ServerProcess], store: Path) -> None:
    archive(store, "echo")
    server = start_server(store=store, combined=True)
    assert server.register("echo.mar").status == 200
    assert server.predict("echo", b"x").body == b"x"
    assert server.request("inference", "POST", "/v1/models/echo:predict", body=b"v1").body == b"v1"
    assert server.request("inference", "POST", "/models/echo/invoke", body=b"mme").body == b"mme"
    assert server.request("inference", "GET", "/v1/models/echo").json() == {"name": "echo", "ready": True}
    assert server.request("inference", "GET", "/models/echo/1.0").status == 200
    assert server.request("inference", "GET", "/metrics").status == 200
    assert manage(server, "DELETE", "/models/echo").status == 200
