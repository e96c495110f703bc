"""Deployments of Ray Serve on a real local Ray: what they answer, and what becomes of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support import http as client
from support.archives import archive
from support.eventually import eventually
from support.processes import MARKER, marked, shared_memory
from support.server import REPOSITORY, free_ports

from wsgi_ts.errors import ServerError

# Imported where it is used: it takes seconds, and has warnings of its own, then and at its end.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("ray") is None, reason="ray[serve] is not installed (the extra `ray`)"),
]

PAGE = REPOSITORY / "docs" / "ray.md"
#: Ray starts dozens of processes, which takes minutes on a machine that is busy.
_COMMAND_LIMIT_S = 300.0
#: Answers with its word and the body, in parts when asked to; shows the head; fails.
HANDLER = """
import os, time
from ts.utils.util import PredictionException
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    bodies = [row.get("body") for row in data]
    if isinstance(bodies[0], dict):
        return [{"size": len(data), **body} for body in bodies]
    first = bytes(bodies[0]).decode()
    if first.startswith("/"):
        send_intermediate_predict_response([b"first "], context.request_ids, "ok", 200, context)
        while not os.path.exists(first):
            time.sleep(0.01)
        return [b"second"]
    if first == "fails":
        raise ValueError("no")
    if first.startswith("raises "):
        _, code, text = first.split(" ", 2)
        raise PredictionException(text, int(code))
    if first == "head":
        context.set_response_content_type(0, "text/x-head")
        context.set_response_status(418, "teapot", 0)
        return [" ".join(context.get_request_header(0, name) or "-" for name in ("x-a", "x-b"))]
    time.sleep(0.02)
    return [b"WORD " + bytes(body) for body in bodies]
"""


class Cluster:
    """A local Ray with one application."""

    def __init__(self, store: Path, folder: Path, marker: str, port: int) -> None:
        import ray
        from ray import serve

        self.serve = serve
        self._address = ray.get_runtime_context().gcs_address
        self.store = store
        self.port = port
        self._folder = folder
        self.marker = marker

    def run(self, word: str = "one", **options: Any) -> Any:
        """Deploys the handler with its word, and waits until it answers; returns the application's handle."""
        mar = archive(self.store, "words", HANDLER.replace("WORD", word), file_name=f"words_{word}.mar")
        return self.deploy(mar, "/", batch_size=4, name="words", **options)

    def deploy(self, mar: Path, prefix: str, **options: Any) -> Any:
        """Deploys an archive as an application that has the name of its path; returns the handle."""
        from wsgi_ts.integrations.ray import deployment

        small = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 0.5}
        small |= {"graceful_shutdown_wait_loop_s": 0.1}
        made = deployment(mar, settings={"preload_modules": ""}, **{**small, **options})
        return self.serve.run(made.bind(), name=f"at {prefix}", route_prefix=prefix)

    def ask(self, body: bytes | str, path: str = "/", **headers: str) -> client.Reply:
        """Posts a request."""
        fields = {"content-type": "application/octet-stream", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return client.request(self.port, "POST", path, headers=fields, body=body, timeout=120)

    def engines(self) -> dict[Path, str]:
        """The run directories of engines, and what the names of each one's shared memory begin with."""
        return {run_dir: record["prefix"] for run_dir, record in self._records().items()}

    def supervisors(self) -> list[int]:
        """The supervisors of engines."""
        children = [child for record in self._records().values() for child in record["children"]]
        return [child["pid"] for child in children if child["role"] == "supervisor"]

    def replicas(self) -> list[int]:
        """Ray's processes that have engines."""
        return [each.pid for each in marked(self.marker) if "ServeReplica" in command_of(each)]

    def type(self, command: str, folder: Path) -> str:
        """Types a command of the page; returns what it prints."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "RAY_ADDRESS": self._address}
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _records(self) -> dict[Path, Any]:
        found = {}
        for record in self._folder.glob("*-engines/*/record.json"):
            with contextlib.suppress(OSError):  # it is just being removed
                found[record.parent] = json.loads(record.read_text())
        return found


def command_of(process: psutil.Process) -> str:
    """The command line; none of one that has ended by now."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    patch = pytest.MonkeyPatch()
    marker = uuid.uuid4().hex
    port = free_ports(1)[0]
    with tempfile.TemporaryDirectory(prefix="wts-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        for name, value in {
            MARKER: marker,
            "SPT_NOENV": "1",
            "TMPDIR": folder,
            "PYTHONPATH": os.fspath(REPOSITORY),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": folder,
            # Ray ends its own proxy when it is not ready, or does not answer, within seconds.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        }.items():
            patch.setenv(name, value)
        import ray
        from ray import serve

        try:
            ray.init(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield Cluster(tmp_path_factory.mktemp("store"), Path(folder), marker, port)
        finally:
            serve.shutdown()
            ray.shutdown()
            patch.undo()


@pytest.fixture(scope="module")
def handle(cluster: Cluster) -> Any:
    """Two replicas, and what other deployments call them by."""
    return cluster.run(num_replicas=2)


def test_replicas_answer_as_the_server_does(cluster: Cluster, handle: Any) -> None:
    assert len(cluster.engines()) == 2
    assert {cluster.ask("x", path).body for path in ("/", "/predictions/words", "/predictions/words/1.0")} == {b"one x"}
    reply = cluster.ask("head", x_a="b c")
    assert (reply.status, reply.headers["content-type"], reply.body) == (418, "text/x-head", b"b c -")
    assert cluster.ask('{"a": 1}', content_type="application/json").json() == {"size": 1, "a": 1}
    for body, path, status, kind in (
        ("x", "/predictions/none", 404, "ModelNotFoundException"),
        ("x", "/predictions/words/7", 404, "ModelVersionNotFoundException"),
        ("x", "/nothing", 404, "ResourceNotFoundException"),
        ("fails", "/", 503, "InternalServerException"),
    ):
        reply = cluster.ask(body, path)
        assert (reply.status, reply.json()["type"]) == (status, kind), reply.text
        assert reply.headers["cache-control"].startswith("no-cache")
    reply = cluster.ask(b"x" * 7_000_000)
    assert (reply.status, reply.body) == (413, b"")


#: What a handler raises, and what clients are told: the server makes a handler's 413 a 507.
RAISED = ((413, "too much", 507), (422, "no number", 422), (503, "", 503), (599, "later", 599))


def test_what_a_handler_raises_is_told_as_over_http(cluster: Cluster, handle: Any) -> None:
    for code, text, status in RAISED:
        reply = cluster.ask(f"raises {code} {text}")
        told = {"code": status, "type": "InternalServerException", "message": text}
        assert (reply.status, reply.json()) == (status, told)
        with pytest.raises(ServerError) as raised:
            handle.remote(f"raises {code} {text}".encode()).result()
        assert raised.value.to_dict() == told


def test_a_stream_comes_part_by_part(cluster: Cluster, handle: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=120)
    connection.request("POST", "/", str(gate), {"content-type": "application/octet-stream"})
    reply = connection.getresponse()
    assert reply.read(6) == b"first "
    gate.touch()
    assert reply.read() == b"second"
    connection.close()


def test_a_handle_takes_bytes_or_json_and_streams(handle: Any, tmp_path: Path) -> None:
    assert handle.remote(b"x").result() == b"one x"
    assert handle.predict.remote({"b": [1, None]}).result() == {"size": 1, "b": [1, None]}
    assert handle.predict.remote(b"head", {"X-A": "forged\r\nx: y"}).result() == b"forged x: y -"
    gate = tmp_path / "gate"
    parts = handle.options(stream=True).stream.remote(str(gate).encode())
    assert next(parts) == b"first "
    gate.touch()
    assert list(parts) == [b"second"]
    with pytest.raises(ServerError, match="Prediction failed"):
        handle.remote(b"fails").result()


def test_requests_that_come_together_are_one_batch(handle: Any) -> None:
    largest: list[int] = []

    def are_together() -> bool:
        answers = [handle.remote({"n": number}) for number in range(40)]
        largest.append(max(each.result()["size"] for each in answers))
        return largest[-1] > 1

    # On a busy machine they may come so slowly that each is served before the next is there.
    eventually(are_together, within=60, what="a batch of several")
    assert max(largest) <= 4


def test_what_an_autoscaling_policy_can_go_by(handle: Any) -> None:
    stats = handle.record_autoscaling_stats.remote().result()
    assert {"ts_queue_depth", "ts_running_requests", "ts_queue_wait_seconds"} <= stats.keys()
    assert all(isinstance(value, float) for value in stats.values())


def test_a_rolling_update_loses_no_request(cluster: Cluster, handle: Any) -> None:
    before = cluster.engines()
    outcomes: Counter[str] = Counter()
    stopping = threading.Event()

    def ask() -> None:
        while not stopping.is_set():
            try:
                reply = cluster.ask("x")
                outcomes[f"{reply.status} {reply.text}"] += 1
            except (OSError, http.client.HTTPException) as error:
                outcomes[repr(error)] += 1
            stopping.wait(0.05)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: outcomes["200 one x"] > 20, within=60, what="the first answers")
        cluster.run("two", num_replicas=2)
        after = outcomes["200 two x"]
        eventually(lambda: outcomes["200 two x"] > after + 20, within=60, what="answers of the new version")
        eventually(lambda: not before.keys() & cluster.engines().keys(), within=60, what="the end of the old engines")
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert outcomes.keys() == {"200 one x", "200 two x"}, outcomes
    assert not [name for prefix in before.values() for name in shared_memory(prefix)]


def test_a_replica_whose_engine_has_ended_is_unhealthy_and_replaced(cluster: Cluster) -> None:
    before = set(eventually(lambda: cluster.supervisors()[1:] and cluster.supervisors(), within=60, what="two engines"))
    os.kill(min(before), 9)
    replies = [cluster.ask("x") for _ in range(10)]
    errors = [reply.json()["message"] for reply in replies if reply.status == 503]
    assert set(errors) <= {"The engine has ended: its supervisor was killed or has failed"}
    assert all(reply.text == "two x" for reply in replies if reply.status != 503)
    eventually(lambda: len({*cluster.supervisors()} - before) == 1, within=60, what="another engine")


def test_a_killed_replica_leaves_nothing(cluster: Cluster) -> None:
    # The one that was replaced just now may not have ended yet.
    eventually(lambda: len(cluster.engines()) == len(cluster.replicas()) == 2, within=60, what="two replicas")
    before = cluster.engines()
    os.kill(cluster.replicas()[0], 9)
    (gone,) = eventually(lambda: before.keys() - cluster.engines().keys(), within=30, what="the end of its engine")
    eventually(lambda: not gone.exists(), within=30, what="the end of its directory")
    eventually(lambda: not shared_memory(before[gone]), within=20, what="the end of its shared memory")
    eventually(lambda: cluster.ask("x").text == "two x", within=60, what="answers of the other replica")


def test_the_page_and_the_end_leave_neither_processes_nor_shared_memory(cluster: Cluster, tmp_path: Path) -> None:
    """The commands of docs/ray.md, typed; but for the last, `serve shutdown`, which asks Ray's dashboard."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    commands = block.replace(":8000/", f":{cluster.port}/").splitlines()
    printed = [cluster.type(command, tmp_path) for command in commands]
    answers = [json.loads(text) for text, command in zip(printed, commands, strict=True) if command.startswith("curl")]
    assert answers == [
        {"greeting": "Hello, Ann!", "together": 1},
        {"greeting": "Hello, Ben!", "together": 1},
        ["Hello, Ann!", "Hello, Ben!"],
    ]
    prefixes = list(cluster.engines().values())
    assert len(prefixes) >= 3
    cluster.serve.shutdown()
    eventually(lambda: not cluster.engines(), within=60, what="the end of the engines")
    eventually(lambda: not ours(cluster), within=60, what="the end of their processes")
    assert not [name for prefix in prefixes for name in shared_memory(prefix)]


def ours(cluster: Cluster) -> list[int]:
    """The processes of engines."""
    return [each.pid for each in marked(cluster.marker) if "wsgi-ts" in command_of(each)]


def test_the_manifest_for_kuberay_means_what_it_says() -> None:
    manifest = yaml.safe_load((REPOSITORY / "deploy" / "kubernetes" / "rayservice.yaml").read_text())
    (app,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    from ray.serve.schema import ServeApplicationSchema

    ServeApplicationSchema.model_validate(app)
    module, _, builder = app["import_path"].partition(":")
    built = getattr(import_module(module), builder)(app["args"])
    assert built._bound_deployment.name == app["deployments"][0]["name"]
