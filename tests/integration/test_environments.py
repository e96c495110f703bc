"""Models with Python packages of their own: installed once, kept apart, and failing with a reason."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess

from wsgi_ts.errors import ModelFailed
from wsgi_ts.models.environment import ModelEnvironments, environment_key

TELLS = """
import json, sys
import numpy
try:
    import tiny
except ImportError:
    tiny = None

def handle(data, context):
    if data is None:
        return None
    found = {"tiny": tiny and tiny.VERSION, "python": sys.executable, "numpy": numpy.__version__, "prefix": sys.prefix}
    return [json.dumps(found) for _ in data]
"""
BEFOREHAND = "import os\nIMPORTED_IN = os.getpid()\n"
FORKED = """
import os
import beforehand

def handle(data, context):
    return [beforehand.IMPORTED_IN == os.getppid() for _ in data or ()]
"""


def wheel(folder: Path, version: str) -> Path:
    """A wheel of a package `tiny` with this version in it."""
    name = f"tiny-{version}"
    files = {
        "tiny.py": f"VERSION = {version!r}\n",
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text)}\n")
    files[f"{name}.dist-info/RECORD"] = "".join([*rows, f"{name}.dist-info/RECORD,,\n"])
    target = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as bundle:
        for path, text in files.items():
            bundle.writestr(path, text)
    return target


def with_requirements(store: Path, name: str, requirements: str, **options: Any) -> None:
    files = {"requirements.txt": requirements, **options.pop("files", {})}
    archive(store, name, TELLS, files=files, manifest_overrides={"requirementsFile": "requirements.txt"}, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[ServerProcess]:
    store = place / "store"
    store.mkdir()
    old, new = wheel(place, "1.0"), wheel(place, "2.0")
    with_requirements(store, "old", "tiny==1.0\nnumpy\n")
    with_requirements(store, "same", "tiny==1.0\nnumpy\n")
    with_requirements(store, "new", "./tiny-2.0-py3-none-any.whl\n", files={new.name: new.read_bytes()})
    with_requirements(store, "none", "no-such-package-anywhere==1.0\n")
    archive(store, "gone", TELLS, manifest_overrides={"requirementsFile": "not-there.txt"})
    archive(store, "bare", TELLS, config_yaml="useVenv: true\n")
    archive(store, "plain", TELLS)
    archive(store, "forked", FORKED)
    archive(store, "shadow", TELLS, config_yaml="useVenv: true\n", files={"json.py": "raise SystemExit('hidden')\n"})
    assert old.exists()
    modules = place / "modules"
    modules.mkdir()
    (modules / "beforehand.py").write_text(BEFOREHAND)
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(place), "XDG_CACHE_HOME": str(place / "cache")}
    with ServerProcess(
        store=store,
        config={"install_py_dep_per_model": "true", "preload_modules": "beforehand"},
        environment=variables | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{modules}"},
    ) as running:
        yield running


def tell(server: ServerProcess, name: str) -> dict[str, Any]:
    found: dict[str, Any] = eventually(lambda: server.predict(name), within=30, what=name).json()
    return found


def environments(place: Path) -> list[Path]:
    return sorted(path for path in (place / "cache/wsgi-ts/environments").iterdir() if path.is_dir())


@pytest.mark.slow
def test_two_versions_of_a_package_side_by_side(server: ServerProcess, place: Path) -> None:
    for name in ("old", "same", "new", "plain"):
        reply = server.register(f"{name}.mar")
        assert reply.status == 200, server.output()[-3000:]
    old, same, new, plain = (tell(server, name) for name in ("old", "same", "new", "plain"))
    assert (old["tiny"], new["tiny"], plain["tiny"]) == ("1.0", "2.0", None)
    # What the server has already and fits is not installed again; equal requirements share one environment.
    assert old["numpy"] == plain["numpy"]
    assert same == old
    assert plain["python"] == sys.executable
    assert len(environments(place)) == 2
    assert old["python"].startswith(str(place / "cache"))
    assert not list((environments(place)[0]).glob("lib/*/site-packages/numpy"))
    assert server.output().count("Successfully installed tiny-1.0") == 1
    assert (place / "cache/wsgi-ts/environments").stat().st_mode & 0o777 == 0o700


def test_an_environment_without_requirements(server: ServerProcess) -> None:
    assert server.register("bare.mar").status == 200
    bare = tell(server, "bare")
    assert bare["prefix"] != sys.prefix
    assert bare["tiny"] is None
    assert server.request("management", "GET", "/models/bare").json()[0]["useVenv"] is True
    # A worker that was killed comes back in the same environment.
    worker = server.request("management", "GET", "/models/bare").json()[0]["workers"][0]["pid"]
    os.kill(worker, 9)

    def is_another() -> bool:
        workers = server.request("management", "GET", "/models/bare").json()[0]["workers"]
        return [(each["status"], each["pid"] != worker) for each in workers] == [("READY", True)]

    eventually(is_another, within=60, what="the next worker")
    assert tell(server, "bare")["prefix"] == bare["prefix"]


def test_a_models_module_hides_no_module_of_python_from_the_server(server: ServerProcess) -> None:
    assert server.register("shadow.mar").status == 200
    assert tell(server, "shadow")["prefix"] != sys.prefix


def test_a_failure_is_told_and_leaves_nothing(server: ServerProcess, place: Path) -> None:
    before = environments(place)
    reply = server.register("none.mar")
    assert (reply.status, reply.json()["type"]) == (400, "ModelException")
    assert reply.json()["message"] == "Custom pip package installation failed for model none"
    told = "No matching distribution found for no-such-package-anywhere==1.0"
    eventually(lambda: told in server.log(), within=5)
    assert environments(place) == before
    assert server.request("management", "GET", "/models/none").status == 404
    reply = server.register("gone.mar")
    assert (reply.status, reply.json()["type"]) == (400, "ModelException")
    eventually(lambda: "the requirements file not-there.txt is not in the archive" in server.log(), within=5)


@pytest.mark.slow
def test_requirements_are_ignored_unless_wanted(start_server: Callable[..., ServerProcess], place: Path) -> None:
    server = start_server(store=place / "store", environment={"XDG_CACHE_HOME": str(place / "unused")})
    assert server.register("old.mar").status == 200
    assert tell(server, "old")["tiny"] is None
    assert not (place / "unused").exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "cannot be run"),
        ("echo 'No module named numpy' >&2; exit 1", "cannot run model workers: No module named numpy; install"),
        ("echo 0.0.1", "has wsgi-ts 0.0.1, the server is"),
    ],
)
def test_an_interpreter_that_cannot_run_workers(script: str | None, reason: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    server = ServerProcess(config={"python": str(python)})
    try:
        server.start(ready=False)
        eventually(lambda: server.returncode is not None, within=90, what="end of the start")
        assert server.returncode == 1
        assert f"python={python}: {reason}" in server.output()
    finally:
        server.__exit__(None)


@pytest.mark.slow
def test_another_interpreter(start_server: Callable[..., ServerProcess], place: Path, tmp_path: Path) -> None:
    # The same packages, reached by another name: it counts as another interpreter.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nSTARTED_BY={python} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    archive(place / "store", "starter", "import os\n" + TELLS.replace("sys.executable", 'os.environ.get("STARTED_BY")'))
    server = start_server(store=place / "store", config={"python": str(python)})
    assert server.register("starter.mar").status == 200
    assert tell(server, "starter")["python"] == str(python)


def own_environments(folder: Path, stopping: bool = False) -> ModelEnvironments:
    variables = {"XDG_CACHE_HOME": str(folder / "cache"), "PATH": os.environ["PATH"]}
    return ModelEnvironments(sys.executable, variables, lambda: stopping)


@pytest.mark.parametrize(("stopping", "reason"), [(False, "it took too long"), (True, "the server is stopping")])
def test_making_one_ends_in_time_or_with_the_server(
    stopping: bool, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = own_environments(tmp_path, stopping)
    with pytest.raises(ModelFailed, match="Virtual environment creation failed for model m"):
        made.provide("m", tmp_path, None, limit_s=60.0 if stopping else 0.0)
    assert reason in caplog.text
    assert environments(tmp_path) == []


def test_one_environment_is_made_once_however_many_ask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with ThreadPoolExecutor(4) as pool:
        # Each with a lock of its own, as other instances have.
        asked = [pool.submit(own_environments(tmp_path).provide, "m", tmp_path, None) for _ in range(4)]
        found = {each.result() for each in asked}
    assert len(found) == 1
    assert sum("Making the Python environment" in message for message in caplog.messages) == 1
    (place,) = environments(tmp_path)
    # One that was broken off, by a kill or a full disk, is made anew.
    (place / "complete").unlink()
    (place / "half").touch()
    assert {own_environments(tmp_path).provide("m", tmp_path, None)} == found
    assert not (place / "half").exists()


def test_what_makes_another_environment(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (tmp_path / "requirements.txt").write_text("-r more.txt\n./a.whl\n")
    (tmp_path / "more.txt").write_text("x\n")
    (tmp_path / "a.whl").write_bytes(b"1")

    def key(*interpreter: str) -> str:
        return environment_key(interpreter, [str(packages)], tmp_path, "requirements.txt")

    first = key("3.11")
    assert key("3.11") == first
    keys = {first, key("3.12")}
    for path, content in (("a.whl", "2"), ("more.txt", "y\n"), ("requirements.txt", "./a.whl\n")):
        (tmp_path / path).write_text(content)
        keys.add(key("3.11"))
    (packages / "numpy-2.0.dist-info").mkdir()
    keys.add(key("3.11"))
    assert len(keys) == 6


def test_modules_are_imported_before_workers_are_forked(server: ServerProcess) -> None:
    assert server.register("forked.mar").status == 200
    assert server.predict("forked").text == "true"
