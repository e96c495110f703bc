"""A server in a container as Kubernetes makes one: no right, one folder to write to, no file that configures it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.sandbox import environment, is_possible, sandboxed
from support.server import REPOSITORY, free_ports

if not is_possible():
    pytest.skip("namespaces take root, unshare and setpriv", allow_module_level=True)

_WSGI_TS = "import sys; from wsgi_ts.cli.commands import wsgi_ts; sys.exit(wsgi_ts())"
#: What a model worker may do.
RIGHTS = """
import json, os

def handle(data, context):
    if data is None:
        return None
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
    try:
        open("/tmp/written-by-a-handler", "w")
    except OSError as error:
        written = error.strerror
    kept = {key: status[key] for key in ("CapEff", "CapBnd", "NoNewPrivs")}
    return [json.dumps({"uid": os.getuid(), "written": written, **kept})] * len(data)
"""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that uid 1000 can reach: pytest's own are closed to others."""
    folder = Path("/tmp") / f"wts-pod-{os.urandom(6).hex()}"
    folder.mkdir(mode=0o755)
    (folder / "models").mkdir()
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def pod(place: Path, variables: Mapping[str, str], *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server with these variables; `place/tmp` is all that it can write to."""
    folder = place / "tmp"
    command = sandboxed(folder, sys.executable, "-c", _WSGI_TS, "serve", *flags)
    with (place / "output").open("ab") as output:
        process = subprocess.Popen(command, env=environment(folder, **variables), stdout=output, stderr=output, cwd="/")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def settings(place: Path, **more: str) -> tuple[dict[str, int], dict[str, str]]:
    """Ports, and the variables that configure a server with them."""
    names = ("inference", "management", "metrics", "grpc_inference", "grpc_management")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    addresses = {f"TS_{name.upper()}_ADDRESS": f"http://127.0.0.1:{ports[name]}" for name in names[:3]}
    addresses |= {f"TS_{name.upper()}_PORT": str(ports[name]) for name in names[3:]}
    variables = {
        "TS_ENABLE_ENVVARS_CONFIG": "true",
        "TS_MODEL_STORE": os.fspath(place / "models"),
        "TS_LOAD_MODELS": "all",
        "TS_PRELOAD_MODULES": "",
        "TS_DEFAULT_WORKERS_PER_MODEL": "1",
    }
    return ports, variables | addresses | more


def is_ready(port: int, process: subprocess.Popen[bytes], place: Path) -> bool:
    assert process.poll() is None, (place / "output").read_text()
    with contextlib.suppress(OSError):
        return http.request(port, "GET", "/readyz").status == 200
    return False


def test_nothing_but_the_environment_and_one_folder(place: Path) -> None:
    archive(place / "models", "rights", RIGHTS)
    ports, variables = settings(place)
    with pod(place, variables) as process:
        eventually(lambda: is_ready(ports["inference"], process, place), within=60)
        rights: dict[str, Any] = http.request(ports["inference"], "POST", "/predictions/rights", body=b"").json()
        none = "0" * 16
        assert rights == {
            "uid": 1000,
            "written": "Read-only file system",
            "CapEff": none,
            "CapBnd": none,
            "NoNewPrivs": "1",
        }
        assert (place / "tmp" / "logs" / "ts_log.log").exists()
        text = (place / "output").read_text()
        assert f"the current directory cannot be written: logs go to {place / 'tmp' / 'logs'}" in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    left = {entry.name for entry in (place / "tmp").iterdir()}
    assert left == {"logs"}, left


def test_knative_says_at_which_port(place: Path) -> None:
    """Also: large bodies within 64 MB of shared memory, one after the other."""
    archive(place / "models", "echo")
    ports, variables = settings(place, K_SERVICE="echo", TS_DISABLE_TOKEN_AUTHORIZATION="true")
    del variables["TS_INFERENCE_ADDRESS"]
    with pod(place, {**variables, "PORT": str(ports["inference"])}) as process:
        eventually(lambda: is_ready(ports["inference"], process, place), within=60)
        body = os.urandom(6_000_000)
        headers = {"content-type": "application/octet-stream"}
        for _ in range(4):
            reply = http.request(ports["inference"], "POST", "/predictions/echo", body=body, headers=headers)
            assert reply.body == body, reply.status


def test_the_doctor_knows_what_a_pod_needs(place: Path) -> None:
    _, variables = settings(place, TS_DRAIN_DELAY="20")
    command = [sys.executable, "-c", _WSGI_TS, "doctor", "--k8s"]
    done = subprocess.run(
        command,
        env=environment(place, **variables, VIRTUAL_ENV=""),
        cwd=REPOSITORY / "tests",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout
    assert done.returncode == 1
    assert "is out of reach for the service and for probes; set inference_address=http://0.0.0.0:8080" in lines
    assert "is out of reach for Prometheus" in lines
    assert "set metrics_mode=prometheus" in lines
    assert "it may take 55 s; set terminationGracePeriodSeconds: 55 or more" in lines
    assert "root; set runAsNonRoot: true" in lines
    assert "cores; memory: " in lines
