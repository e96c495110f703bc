"""Promises of the data path, each against a running server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, WITH_TORCH, ServerProcess, free_ports
from support.wars import war

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import WORKFLOW_CODES, WorkflowWord
from wsgi_ts.supervisor.metrics.workflows import workflow_words

Start = Callable[..., ServerProcess]

#: Runs until the file named by its body exists; notes each request it was given.
GATE = """
import os, time
def handle(data, context):
    if data is None:
        return None
    for row in data:
        name = row["body"].decode()
        with open(os.path.join(os.environ["GATE"], "seen"), "a") as seen:
            seen.write(name + "\\n")
        while name.startswith("wait") and not os.path.exists(os.path.join(os.environ["GATE"], "open")):
            time.sleep(0.005)
    return ["%d" % len(data)] * len(data)
"""

TORCH = """
import torch
def handle(data, context):
    return [str(torch.ones(1).item() == 1.0)] * len(data or [])
"""


@pytest.fixture
def gate(start_server: Start, store: Path, tmp_path: Path) -> ServerProcess:
    """A server with the model `gate`; its handler's notes lie in tmp_path."""
    archive(store, "gate", GATE)
    return start_server(store=store, environment={"GATE": str(tmp_path)}, config={"job_queue_size": "4"})


def seen(folder: Path) -> list[str]:
    """What the handler was given so far."""
    path = folder / "seen"
    return path.read_text().split() if path.exists() else []


def test_a_full_queue_is_refused_at_once_and_takes_requests_again(gate: ServerProcess, tmp_path: Path) -> None:
    gate.register("gate.mar")
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(gate.predict, "gate", "wait-0")
        eventually(lambda: seen(tmp_path) == ["wait-0"], within=5)
        queued = [pool.submit(gate.predict, "gate", f"wait-{number}") for number in range(1, 5)]
        eventually(
            lambda: (
                gate.request("management", "GET", "/models/gate").json()[0]["jobQueueStatus"]
                == {"remainingCapacity": 0, "pendingRequests": 4}
            ),
            within=5,
        )
        refused = gate.predict("gate", "one too many")
        assert refused.status == 503
        assert refused.json()["type"] == "ServiceUnavailableException"
        (tmp_path / "open").touch()
        assert [future.result().status for future in [first, *queued]] == [200] * 5
    assert "one" not in seen(tmp_path)
    assert gate.predict("gate", "again").status == 200


@pytest.mark.parametrize("hard", [False, True], ids=["FIN", "RST"])
def test_the_queued_request_of_a_client_that_left_is_not_run(gate: ServerProcess, tmp_path: Path, hard: bool) -> None:
    gate.register("gate.mar")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gate.predict, "gate", "wait-0")
        eventually(lambda: seen(tmp_path) == ["wait-0"], within=5)
        leaver = socket.create_connection(("127.0.0.1", gate.ports["inference"]))
        leaver.sendall(b"POST /predictions/gate HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nleaver")
        eventually(
            lambda: (
                gate.request("management", "GET", "/models/gate").json()[0]["jobQueueStatus"]["pendingRequests"] == 1
            ),
            within=5,
        )
        if hard:
            leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        leaver.close()
        eventually(
            lambda: (
                gate.request("management", "GET", "/models/gate").json()[0]["jobQueueStatus"]["pendingRequests"] == 0
            ),
            within=5,
        )
        stayer = pool.submit(gate.predict, "gate", "stayer")
        (tmp_path / "open").touch()
        assert first.result().status == stayer.result().status == 200
    assert seen(tmp_path) == ["wait-0", "stayer"]


def test_a_client_that_only_closed_its_sending_half_is_answered(gate: ServerProcess, tmp_path: Path) -> None:
    gate.register("gate.mar")
    with gate.raw() as connection:
        connection.send(b"POST /predictions/gate HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nwait")
        eventually(lambda: seen(tmp_path) == ["wait"], within=5)
        connection.sock.shutdown(socket.SHUT_WR)
        (tmp_path / "open").touch()
        answer = connection.read_rest()
    assert answer.endswith(b"\r\n\r\n1")


def test_a_single_client_never_waits_for_a_batch(gate: ServerProcess) -> None:
    gate.register("gate.mar", batch_size=8, max_batch_delay=600_000)
    for number in range(5):
        assert gate.predict("gate", str(number)).text == "1"  # within the client's 60 s, so not after ten minutes


def test_fixed_policy_waits_for_a_full_batch_as_torchserve_does(
    start_server: Start, store: Path, tmp_path: Path
) -> None:
    archive(store, "gate", GATE)
    config = {"batch_policy": "fixed"}
    server = start_server(store=store, environment={"GATE": str(tmp_path)}, config=config)
    server.register("gate.mar", batch_size=4, max_batch_delay=600_000)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda number: server.predict("gate", str(number)).text, range(4)))
    assert replies == ["4"] * 4


def test_requests_of_several_web_workers_and_models_are_kept_apart(start_server: Start, store: Path) -> None:
    for name in ("a", "b"):
        source = f"def handle(data, context):\n    return ['{name}:' + bytes(r['body']).decode() for r in data or []]\n"
        archive(store, name, source)
    server = start_server(store=store, web_workers=3)
    for name in ("a", "b"):
        server.register(f"{name}.mar", initial_workers=2, batch_size=4)

    def ask(number: int) -> bool:
        name = "ab"[number % 2]
        return server.predict(name, str(number)).text == f"{name}:{number}"

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(400)))


def test_torch_is_loaded_once_for_those_whose_handlers_use_it(start_server: Start, store: Path) -> None:
    archive(store, "echo")
    archive(store, "torch", TORCH)
    server = start_server(store=store, config=WITH_TORCH)
    for name, answer in (("echo", "x"), ("torch", "True")):
        server.register(f"{name}.mar")
        assert server.predict(name, "x").text == answer
    loaded: dict[str, set[bool]] = {}
    parents = {}
    processes = server.processes()
    for process in processes:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        name = process.command.split()[-2] if process.role == "model-worker" else process.role
        loaded.setdefault(name, set()).add("libtorch" in maps)
        parents[name] = next((each.role for each in processes if each.pid == process.parent), "")
    assert loaded["warm-template"] == loaded["torch"] == {True}
    assert (parents["echo"], parents["torch"]) == ("template", "warm-template")
    assert parents["warm-template"] == "template"
    for role in ("supervisor", "template", "echo", "inference-arbiter", "web-worker", "management-worker", "batcher"):
        assert loaded[role] == {False}, role


def test_a_dead_worker_is_told_with_its_cause_and_last_lines(start_server: Start, store: Path) -> None:
    source = "import os, sys\ndef handle(data, context):\n    if data: print('last words', flush=True); os._exit(7)\n"
    archive(store, "dies", source)
    server = start_server(store=store)
    server.register("dies.mar")
    assert server.predict("dies", "x").json()["message"] == "Worker died."
    worker = eventually(
        lambda: next(
            (
                each
                for each in server.request("management", "GET", "/models/dies").json()[0]["workers"]
                if "lastExit" in each
            ),
            None,
        ),
        within=5,
        what="the cause in describe-model",
    )
    assert "7" in worker["lastExit"]
    assert any("last words" in line for line in worker["lastLines"])
    eventually(lambda: "last words" in server.log("model_log.log"), within=5)


SMALL_SHM = """
mount -t tmpfs -o size={size} tmpfs /dev/shm
exec {python} -m pytest -q -p no:cacheprovider -o "python_functions=inner_*" {file}::{test}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm needs root")
@pytest.mark.parametrize("test", ["inner_docker_default", "inner_too_small", "inner_full_while_serving"])
def test_small_shared_memory(test: str) -> None:
    """Runs a test of `shm_inner.py` in a mount namespace of its own with a small /dev/shm."""
    size = {"inner_docker_default": "64m", "inner_too_small": "2m", "inner_full_while_serving": "64m"}[test]
    script = SMALL_SHM.format(
        size=size, python=sys.executable, file=REPOSITORY / "tests/integration/shm_inner.py", test=test
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


GTHREAD = """
import os
from pathlib import Path
from types import SimpleNamespace
from wsgi_ts.settings.config import Config
from wsgi_ts.rest.apps import build_app
run_dir = Path(os.environ["RUN_DIR"])
settings = SimpleNamespace(
    config=Config.from_json((run_dir / "config.json").read_text()), run_dir=run_dir, prefix=os.environ["PREFIX"]
)
app = build_app(("inference",), settings)
"""


def test_the_app_runs_unchanged_under_gthread(start_server: Start, store: Path, tmp_path: Path) -> None:
    """The same Falcon app, in gunicorn's own threaded worker, attached to a running server."""
    streams = """
from ts.handler_utils.utils import send_intermediate_predict_response
def handle(data, context):
    if data is None:
        return None
    for part in ("one ", "two "):
        send_intermediate_predict_response([part], context.request_ids, "", 200, context)
    return ["three"]
"""
    archive(store, "echo")
    archive(store, "streams", streams)
    server = start_server(store=store)
    server.register("echo.mar")
    server.register("streams.mar")
    archive(
        server.store, "sleeps", "import time\ndef handle(data, context):\n    return data and [time.sleep(10) or {}]\n"
    )
    # The time of the others has no end for this test.
    graph = "models:\n  retry-attempts: 0\n  timeout-ms: 60000\n  slow: {url: sleeps.mar, timeout-ms: 300}\n"
    graph += "dag:\n  before: [after, slow]\n"
    war(server.store, "chain", "models: {}\ndag:\n  before: [after]\n")
    war(server.store, "late", graph)
    for name in ("chain", "late"):
        assert server.request("management", "POST", f"/workflows?url={name}.war", timeout=60).status == 200
    (tmp_path / "attached.py").write_text(GTHREAD)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "gunicorn", "-k", "gthread", "--threads", "8", "-b", f"127.0.0.1:{port}"]
    environment = os.environ | {
        "RUN_DIR": str(server.run_dir),
        "PREFIX": server.prefix,
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPOSITORY))),
    }
    with subprocess.Popen([*command, "attached:app"], env=environment, stderr=subprocess.DEVNULL) as gunicorn:
        try:
            eventually(lambda: _answers(port), within=20, what="gunicorn's answer to a ping")
            body = os.urandom(300_000)
            headers = {"content-type": "application/octet-stream"}
            echoed = http.request(port, "POST", "/predictions/echo", headers=headers, body=body)
            assert (echoed.status, echoed.body) == (200, body)
            chunked = http.request(port, "POST", "/predictions/echo", headers=headers, chunks=[b"ab", b"cd"])
            assert chunked.body == b"abcd"
            assert http.request(port, "GET", "/predictions/streams").text == "one two three"
            assert http.request(port, "GET", "/predictions/nope").status == 404
            walked = http.request(port, "POST", "/WFPREDICT/chain", body=b"x")
            assert (walked.status, walked.text) == (200, "x before after")
            assert walked.headers["content-type"] == "application/json"
            late = http.request(port, "POST", "/wfpredict/late", body=b"x")
            assert (late.status, late.json()["message"]) == (500, "Error executing slow")
            large = http.request(port, "POST", "/wfpredict/chain", chunks=[bytes(6_553_501)])
            assert large.status == 413
            refused = WorkflowWord.CODES + WORKFLOW_CODES.index(413)
            board = Board.attach(server.prefix)
            eventually(lambda: sum(workflow_words(board, workflow)[refused] for workflow in range(2)) == 1, within=5)
            with ThreadPoolExecutor(8) as pool:
                bodies = [b"%d" % number for number in range(100)]
                replies = pool.map(lambda body: http.request(port, "POST", "/predictions/echo", body=body).body, bodies)
                assert list(replies) == bodies
        finally:
            gunicorn.terminate()


def _answers(port: int) -> bool:
    try:
        return http.request(port, "GET", "/ping", timeout=5).status == 200
    except OSError:
        return False


def test_options_describes_a_model_and_an_unknown_workflow_is_not_found(echo_server: ServerProcess) -> None:
    described = echo_server.request("inference", "OPTIONS", "/predictions/echo")
    assert described.status == 200
    assert "/predictions/echo" in described.json()["paths"]
    assert echo_server.request("inference", "OPTIONS", "/predictions/nope").status == 404
    unknown = echo_server.request("inference", "POST", "/wfpredict/nope", body=b"x")
    assert (unknown.status, unknown.json()["type"]) == (404, "WorkflowNotFoundException")
