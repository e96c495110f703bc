"""What model-config.yaml and config.properties say of a model, and whether a running server keeps to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess

#: Notes every body it is given in a file; a body `wait:PATH` is answered when PATH exists.
GATED = """
import os, time

NOTES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "notes")

def handle(data, context):
    if data is None:
        return None
    answers = []
    for row in data:
        body = bytes(row["body"] if isinstance(row, dict) else row)  # an envelope may have unwrapped it
        with open(NOTES, "ab") as notes:
            notes.write(body + b"\\n")
        if body.startswith(b"wait:"):
            deadline = time.monotonic() + 100
            while not os.path.exists(body[5:].decode()) and time.monotonic() < deadline:
                time.sleep(0.005)
        answers.append(body)
    return answers
"""

SLOW_START = """
import time

class Handler:
    def initialize(self, context):
        time.sleep(60)

    def handle(self, data, context):
        return [b"" for _ in data]
"""

#: Ends its process when told so; cannot load any more from then on.
FRAGILE = """
import os

class Handler:
    def initialize(self, context):
        self.broken = os.path.join(context.system_properties["model_dir"], "broken")
        if os.path.exists(self.broken):
            raise ValueError("cannot load again")

    def handle(self, data, context):
        open(self.broken, "w").close()
        os._exit(3)
"""

CONFIGURED = """
def handle(data, context):
    if data is None:
        return None
    return [context.model_yaml_config for _ in data]
"""

DESCRIBED = """
import time

def handle(data, context):
    if data is None:
        return None
    if context.get_request_header(0, "describe") != "True":
        return [len(data) for _ in data]
    how = context.model_yaml_config["handler"]["answer"]
    if how == "object":
        return [{"rows": len(data), "version": context.manifest["model"]["modelVersion"]}]
    if how == "call":
        headers = context.get_all_request_header(0)
        return [{"data": data, "headers": headers, "id": context.get_request_id(0)}]
    if how == "raise":
        raise ValueError("nothing to say")
    if how == "sleep":
        time.sleep(60)
    return [how]
"""

SHOWS = """
def handle(data, context):
    return None if data is None else [{key: str(value) for key, value in row.items()} for row in data]
"""

BASED = """
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        self.initialized = True
"""

NO_WORKER = "has no worker to serve inference request"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    two = "minWorkers: 2\nmaxWorkers: 2\n"
    archive(store, "tickets", GATED, config_yaml=f"{two}useJobTicket: true\nbatchSize: 4\nmaxBatchDelay: 5000\n")
    archive(store, "queue", GATED, config_yaml="jobQueueSize: 2\n")
    archive(store, "impatient", GATED, config_yaml="clientTimeoutInMills: 400\n")
    archive(store, "hung", GATED, config_yaml="responseTimeout: 1\n")
    archive(store, "slow_start", SLOW_START, config_yaml="startupTimeout: 1\n")
    archive(store, "fragile", FRAGILE, config_yaml="maxRetryTimeoutInSec: 1\n")
    wrong = "batchSize: many\nresponseTimeout: -1\nuseJobTicket: 1\ndeviceType: tpu\n"
    archive(store, "configured", CONFIGURED, config_yaml=f"handler:\n  mapping: [a, 1]\nfree: {{x: 0.5}}\n{wrong}")
    batched = "batchSize: 8\nmaxBatchDelay: 200\nbatchPolicy: fixed\n"
    for how in ("object", "text", "", "raise", "sleep", "call"):
        limit = "responseTimeout: 1\n" if how == "sleep" else ""
        archive(store, f"described_{how}", DESCRIBED, config_yaml=f'handler: {{answer: "{how}"}}\n{batched}{limit}')
    archive(store, "shows", SHOWS)
    archive(store, "based", BASED)
    yaml = "handler: {answer: object}"
    archive(store, "described", DESCRIBED, version="2.0", file_name="second.mar", config_yaml=yaml)
    with ServerProcess(store=store, web_workers=2) as running:
        yield running


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    """Many clients at a time."""
    with ThreadPoolExecutor(40) as pool:
        yield pool


def register(server: ServerProcess, name: str, **arguments: object) -> None:
    reply = server.register(f"{name}.mar", **arguments)
    assert reply.status == 200, reply.text


def unregister(server: ServerProcess, name: str) -> None:
    reply = server.request("management", "DELETE", f"/models/{name}")
    assert reply.status == 200, reply.text


def describe(server: ServerProcess, path: str) -> dict[str, Any]:
    reply = server.request("management", "GET", f"/models/{path}")
    assert reply.status == 200, reply.text
    (description,) = reply.json()
    assert isinstance(description, dict)
    return description


def notes(server: ServerProcess, name: str) -> list[str]:
    """The bodies that the handler of a gated model was given."""
    found = list((server.run_dir / "models").glob("*/notes"))
    lines = [line for path in found for line in path.read_text().splitlines()]
    return [line for line in lines if name in line]


def hold(server: ServerProcess, clients: ThreadPoolExecutor, model: str, gate: Path, count: int) -> list[Future[Reply]]:
    """Has `count` workers busy until the file `gate` exists."""
    held = []
    for number in range(count):
        held.append(clients.submit(server.predict, model, f"wait:{gate}"))
        eventually(lambda n=number: len(notes(server, gate.name)) > n, within=20, what="a busy worker")
    return held


# Job tickets


def test_job_tickets_let_in_one_request_for_each_free_worker(
    server: ServerProcess, clients: ThreadPoolExecutor, tmp_path: Path
) -> None:
    register(server, "tickets")
    gate = tmp_path / "tickets"
    start = threading.Barrier(20)

    def at_once() -> Reply:
        start.wait()
        return server.predict("tickets", f"wait:{gate}")

    asked = [clients.submit(at_once) for _ in range(20)]
    eventually(lambda: sum(each.done() for each in asked) == 18, within=20, what="18 refusals")
    refused = [each.result() for each in asked if each.done()]
    assert {reply.status for reply in refused} == {503}
    assert all(NO_WORKER in reply.json()["message"] for reply in refused)
    assert describe(server, "tickets")["useJobTicket"] is True
    empty = {"remainingCapacity": 100, "pendingRequests": 0}
    eventually(lambda: describe(server, "tickets")["jobQueueStatus"] == empty, within=20, what="an empty queue")
    gate.touch()
    assert sorted(each.result().status for each in asked) == [200] * 2 + [503] * 18
    # The two that were let in went to two workers, although one of them takes batches of four.
    assert len(notes(server, gate.name)) == 2
    unregister(server, "tickets")


def test_a_client_for_each_worker_is_never_refused(server: ServerProcess, clients: ThreadPoolExecutor) -> None:
    """The next request of a client that was answered can come before the worker has said that it is free."""
    register(server, "tickets")

    def many() -> set[int]:
        return {server.predict("tickets", b"next").status for _ in range(150)}

    assert [each.result() for each in [clients.submit(many), clients.submit(many)]] == [{200}, {200}]
    unregister(server, "tickets")


# Queue and time-outs


def test_job_queue_size(server: ServerProcess, clients: ThreadPoolExecutor, tmp_path: Path) -> None:
    register(server, "queue")
    gate = tmp_path / "queue"
    held = hold(server, clients, "queue", gate, 1)
    queued = [clients.submit(server.predict, "queue", b"later") for _ in range(2)]
    full = {"remainingCapacity": 0, "pendingRequests": 2}
    eventually(lambda: describe(server, "queue")["jobQueueStatus"] == full, within=20, what="a full queue")
    refused = server.predict("queue", b"too many")
    assert refused.status == 503
    assert refused.json()["message"].startswith('Model "queue" has no worker to serve inference request.')
    gate.touch()
    assert [each.result().status for each in held + queued] == [200] * 3
    unregister(server, "queue")


def test_client_timeout(server: ServerProcess, clients: ThreadPoolExecutor, tmp_path: Path) -> None:
    register(server, "impatient")
    gate = tmp_path / "impatient"
    asked: list[Future[Reply]] = []

    def one_runs() -> bool:
        if notes(server, gate.name):
            return True
        # On a busy machine one may be too late before it has begun.
        if all(each.done() for each in asked):
            asked.append(clients.submit(server.predict, "impatient", f"wait:{gate}"))
        return False

    eventually(one_runs, within=20, what="a busy worker")
    asked += [clients.submit(server.predict, "impatient", f"never {gate.name} {number}") for number in range(3)]
    for reply in [each.result() for each in asked]:
        assert (reply.status, reply.json()["type"]) == (408, "RequestTimeoutException")
        assert "clientTimeoutInMills" in reply.json()["message"]
    gate.touch()
    eventually(lambda: server.predict("impatient", b"in time").text == "in time", within=20, what="a timely answer")
    assert notes(server, gate.name) == [f"wait:{gate}"]
    assert describe(server, "impatient")["clientTimeoutInMills"] == 400
    empty = {"remainingCapacity": 100, "pendingRequests": 0}
    eventually(lambda: describe(server, "impatient")["jobQueueStatus"] == empty, within=20, what="an empty queue")
    unregister(server, "impatient")


def test_response_timeout(server: ServerProcess, tmp_path: Path) -> None:
    register(server, "hung")
    reply = server.predict("hung", f"wait:{tmp_path}/never")
    assert (reply.status, reply.json()["message"]) == (500, "Worker died.")
    eventually(lambda: server.predict("hung", b"again").status == 200, within=20, what="a new worker")
    unregister(server, "hung")


def test_startup_timeout(server: ServerProcess) -> None:
    reply = server.register("slow_start.mar")
    assert (reply.status, reply.json()["type"]) == (500, "InternalServerException")
    assert reply.json()["message"] == "Failed to start workers for model slow_start version: 1.0"
    # Unlike one whose handler fails, a model whose workers take too long does not stay.
    assert server.request("management", "GET", "/models/slow_start").status == 404
    assert server.register("slow_start.mar", initial_workers=0).status == 200
    unregister(server, "slow_start")


def test_max_retry_timeout(server: ServerProcess) -> None:
    register(server, "fragile")
    assert server.predict("fragile").status == 500

    def is_given_up() -> bool:
        return server.request("inference", "GET", "/ping").status == 500

    eventually(is_given_up, within=20, what="an unhealthy server")
    (worker,) = describe(server, "fragile")["workers"]
    assert worker["status"] == "UNLOADING"
    unregister(server, "fragile")
    eventually(lambda: not is_given_up(), within=20, what="a healthy server")


def test_limits_of_sequences_where_the_file_says_nothing_of_them(server: ServerProcess) -> None:
    keys = ("sequenceMaxIdleMSec", "sequenceTimeoutMSec", "maxNumSequence", "maxSequenceJobQueueSize")
    register(server, "configured", initial_workers=0)
    description = describe(server, "configured")
    assert [description[key] for key in keys] == [0, 0, 0, 0]
    unregister(server, "configured")


def test_the_handler_sees_the_whole_file_and_wrong_types_keep_their_default(server: ServerProcess) -> None:
    register(server, "configured")
    seen = server.predict("configured").json()
    assert (seen["handler"], seen["free"]) == ({"mapping": ["a", 1]}, {"x": 0.5})
    description = describe(server, "configured")
    assert (description["batchSize"], description["responseTimeout"]) == (1, 120)
    assert (description["useJobTicket"], description["deviceType"]) == (False, "cpu")
    log = server.log()
    for line in (
        "model-config.yaml:4: key batchSize: 'many' is not a whole number; taken as not given",
        "model-config.yaml:5: key responseTimeout: -1 is not between 1 and 2147483647; taken as not given",
        "model-config.yaml:6: key useJobTicket: 1 is neither true nor false; taken as not given",
        "model-config.yaml:7: key deviceType: 'tpu' is none of: cpu, gpu; taken as not given",
    ):
        assert f"configured 1.0: {line}" in log
    unregister(server, "configured")


# Describe in the handler's words


@pytest.mark.parametrize(("how", "metadata"), [("object", {"rows": 1, "version": "1.0"}), ("text", {}), ("", None)])
def test_customized_metadata(server: ServerProcess, how: str, metadata: dict[str, Any] | None) -> None:
    name = f"described_{how}"
    register(server, name)
    plain = describe(server, name)
    customized = describe(server, f"{name}?customized=true")
    assert "customizedMetadata" not in plain
    assert customized.get("customizedMetadata") == metadata
    assert [key for key in customized if key != "customizedMetadata"] == list(plain)
    if metadata is not None:
        assert list(customized)[-1] == "customizedMetadata"
    (every,) = server.request("management", "GET", f"/models/{name}/all?customized=true").json()
    assert "customizedMetadata" not in every
    unregister(server, name)


def test_customized_describe_of_handlers_that_do_not_know_it(server: ServerProcess) -> None:
    # One that answers what it was given: an empty row. And the base class, whose describe_handle says nothing.
    for name in ("shows", "based"):
        register(server, name)
        assert describe(server, f"{name}?customized=true")["customizedMetadata"] == {}
        unregister(server, name)


def test_what_a_handler_is_asked_to_describe_with(server: ServerProcess) -> None:
    register(server, "described_call")
    headers = {"X-Mine": "1"}
    reply = server.request("management", "GET", "/models/described_call?customized=true", headers=headers)
    seen = reply.json()[0]["customizedMetadata"]
    assert seen["data"] == [{}]
    assert seen["id"] == reply.headers["x-request-id"]
    assert (seen["headers"]["describe"], seen["headers"]["X-Mine"]) == ("True", "1")
    assert not {"explain", "url_path"} & seen["headers"].keys()
    unregister(server, "described_call")


def test_customized_describe_is_alone_in_its_batch(server: ServerProcess, clients: ThreadPoolExecutor) -> None:
    register(server, "described_object")
    predictions = [clients.submit(server.predict, "described_object") for _ in range(3)]
    metadata = [clients.submit(describe, server, "described_object/1.0?customized=TRUE") for _ in range(3)]
    assert {each.result()["customizedMetadata"]["rows"] for each in metadata} == {1}
    assert {each.result().status for each in predictions} == {200}
    unregister(server, "described_object")


def test_customized_describe_of_a_version(server: ServerProcess) -> None:
    assert server.register("described_object.mar", model_name="described").status == 200
    assert server.register("second.mar").status == 200
    assert describe(server, "described/2.0?customized=true")["customizedMetadata"]["version"] == "2.0"
    assert describe(server, "described?customized=true")["customizedMetadata"]["version"] == "1.0"
    assert server.request("management", "DELETE", "/models/described/2.0").status == 200
    unregister(server, "described")


@pytest.mark.parametrize(
    ("how", "status", "kind", "message"),
    [
        ("raise", 503, "InternalServerException", "Prediction failed"),
        ("sleep", 500, "InternalServerException", "Failed to get customized model matadata."),
    ],
)
def test_customized_describe_that_fails(server: ServerProcess, how: str, status: int, kind: str, message: str) -> None:
    register(server, f"described_{how}")
    reply = server.request("management", "GET", f"/models/described_{how}?customized=true")
    assert (reply.status, reply.json()) == (status, {"code": status, "type": kind, "message": message})
    unregister(server, f"described_{how}")


def test_customized_describe_without_workers(server: ServerProcess) -> None:
    register(server, "described_object", initial_workers=0)
    reply = server.request("management", "GET", "/models/described_object?customized=true")
    assert (reply.status, reply.json()["type"]) == (503, "ServiceUnavailableException")
    assert reply.json()["message"] == (
        'Model "described_object" has no worker to serve describe request. Please use scale workers API to add workers.'
    )
    unregister(server, "described_object")
    missing = server.request("management", "GET", "/models/described_object?customized=true")
    assert (missing.status, missing.json()["message"]) == (404, "Model not found: described_object")


def test_customized_describe_on_one_address(start_server: Callable[..., ServerProcess], store: Path) -> None:
    archive(store, "described", DESCRIBED, config_yaml="handler: {answer: object}")
    combined = start_server(store=store, combined=True)
    register(combined, "described")
    assert describe(combined, "described?customized=true")["customizedMetadata"] == {"rows": 1, "version": "1.0"}
    assert combined.predict("described").text == "1"


# config.properties

FACTS = """
def handle(data, context):
    if data is None:
        return None
    return [
        {
            "body": str(type(data[0].get("body") if isinstance(data[0], dict) else data[0]).__name__),
            "row": type(data[0]).__name__,
            "limit": context.system_properties.get("limit_max_image_pixels"),
        }
        for _ in data
    ]
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose settings are all different from the defaults."""
    store = tmp_path_factory.mktemp("tuned")
    archive(store, "facts", FACTS, manifest_overrides={"handler": None})
    archive(store, "other", FACTS)
    archive(store, "busy", GATED)
    archive(store, "large", "def handle(data, context):\n    return data and [b'x' * 3000 for _ in data]\n")
    entry = {"1.0": {"minWorkers": 2, "maxWorkers": 3, "batchSize": 5, "maxBatchDelay": 77}}
    config = {
        "load_models": "facts.mar,other=other.mar",
        "models": json.dumps({"facts": entry}),
        "debug": "true",
        "default_service_handler": "handler.py:handle",
        "service_envelope": "body",
        "decode_input_request": "false",
        "limit_max_image_pixels": "false",
        "max_response_size": "2000",
        "unregister_model_timeout": "1",
        "number_of_gpu": "0",
        "job_queue_size": "17",
        "io_ratio": "40",
        "vmargs": "-Xmx4g",
    }
    with ServerProcess(store=store, config=config) as running:
        yield running


def test_models_key_and_debug_at_startup(tuned: ServerProcess) -> None:
    facts, other = describe(tuned, "facts"), describe(tuned, "other")
    settings = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout")
    # debug: one worker where nobody says how many, and time to stop it in a debugger.
    week = 7 * 86400
    assert [facts[key] for key in settings] == [2, 3, 5, 77, week, week]
    assert [other[key] for key in settings] == [1, 1, 1, 100, week, week]
    assert len(other["workers"]) == 1
    assert other["jobQueueStatus"]["remainingCapacity"] == 17
    assert facts["loadedAtStartup"] is True


def test_settings_that_handlers_see(tuned: ServerProcess) -> None:
    eventually(lambda: tuned.request("inference", "GET", "/ping").status == 200, within=20, what="ready models")
    reply = tuned.predict("facts", b'{"a": 1}', content_type="application/json")
    # The envelope hands over the body itself, undecoded.
    assert reply.json() == {"body": "bytearray", "row": "bytearray", "limit": False}


def test_max_response_size(tuned: ServerProcess) -> None:
    assert tuned.register("large.mar").status == 200
    reply = tuned.predict("large")
    assert (reply.status, reply.json()["message"]) == (500, "Response is larger than max_response_size")


def test_unregister_timeout(tuned: ServerProcess, clients: ThreadPoolExecutor, tmp_path: Path) -> None:
    assert tuned.register("busy.mar").status == 200
    gate = tmp_path / "busy"
    (running,) = hold(tuned, clients, "busy", gate, 1)
    reply = tuned.request("management", "DELETE", "/models/busy")
    assert (reply.status, reply.json()["message"]) == (408, "Timed out while cleaning resources: busy")
    gate.touch()
    assert running.result().status == 200
    again = eventually(
        lambda: _unless_timed_out(tuned.request("management", "DELETE", "/models/busy")), within=20, what="the end"
    )
    assert again.status == 200


def _unless_timed_out(reply: Reply) -> Reply | None:
    return None if reply.status == 408 else reply


def test_java_settings_are_named_once_at_the_start(tuned: ServerProcess) -> None:
    lines = [line for line in tuned.log().splitlines() if "no effect in this server" in line]
    assert len(lines) == 1
    assert lines[0].endswith("no effect in this server, can be removed: io_ratio, vmargs")


def test_invocations_take_the_model_from_a_form(tuned: ServerProcess, server: ServerProcess) -> None:
    """Two startup models: the request has to name one. None: likewise."""
    for running, model in ((tuned, "other"), (server, "configured")):
        if running is server:
            register(server, model)
        without = running.request("inference", "POST", "/invocations", body=b"x")
        assert (without.status, without.json()["message"]) == (400, "Parameter model_name is required.")
        form = {"content-type": "application/x-www-form-urlencoded"}
        named = running.request("inference", "POST", "/invocations", headers=form, body=f"a=1&model_name={model}")
        assert named.status == 200, named.text
        unknown = running.request("inference", "POST", "/invocations", headers=form, body="model_name=nope")
        assert (unknown.status, unknown.json()["message"]) == (404, "Model not found: nope")
        empty = running.request("inference", "POST", "/invocations", headers=form, body="a=1")
        assert (empty.status, empty.json()["message"]) == (400, "Parameter model_name is required.")
        nameless = running.request("inference", "POST", "/invocations", headers=form, body="model_name=")
        assert (nameless.status, nameless.json()["message"]) == (404, "Model not found: ")
        nameless = running.request(
            "inference", "POST", "/invocations?model_name=", headers=form, body=f"model_name={model}"
        )
        assert (nameless.status, nameless.json()["message"]) == (404, "Model not found: ")
        parts = f'--X\r\nContent-Disposition: form-data; name="model_name"\r\n\r\n{model}\r\n--X--\r\n'
        kind = {"content-type": "multipart/form-data; boundary=X"}
        chunks = [parts[:20].encode(), parts[20:].encode()]
        assert running.request("inference", "POST", "/invocations", headers=kind, chunks=chunks).status == 200
    unregister(server, "configured")
