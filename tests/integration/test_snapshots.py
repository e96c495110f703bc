"""Snapshots: what is written when, and what a start makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.faults import kill
from support.server import ServerProcess

from wsgi_ts.settings.properties import parse_properties

NAME = re.compile(r"[0-9]{17}-(startup|snapshot|shutdown)\.cfg")
CONFIGURED = "batchSize: 4\nmaxBatchDelay: 7\n"
OTHER = """
def other(data, context):
    if data is None:
        return None
    return ["other" for _ in data]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "echo", version="2.0", file_name="echo2.mar", config_yaml=CONFIGURED)
    archive(store, "sick", "raise ValueError('sick')")
    archive(store, "other", files={"second.py": OTHER})
    return store


@pytest.fixture
def server(store: Path) -> Iterator[ServerProcess]:
    """A server that was started once, without models, and is running."""
    with ServerProcess(store=store, snapshots=True, arguments=["--enable-model-api"]) as running:
        yield running


def files(server: ServerProcess, kind: str = "") -> list[Path]:
    return sorted((server.home / "logs" / "config").glob(f"*{kind}.cfg"))


def settings(file: Path) -> dict[str, str]:
    return {row.key: row.value for row in parse_properties(file.read_bytes())}


def recorded(file: Path) -> dict[str, Any]:
    snapshot: dict[str, Any] = json.loads(settings(file)["model_snapshot"])
    return snapshot


def manage(server: ServerProcess, method: str, path: str) -> Any:
    reply = server.request("management", method, path, body=None if method == "GET" else b"", timeout=90)
    assert reply.status == 200, reply.text
    return reply.json()


def described(server: ServerProcess, path: str) -> dict[str, Any]:
    model: dict[str, Any] = manage(server, "GET", f"/models/{path}")[0]
    return model


def restart(server: ServerProcess, ts_config: Path | None = None) -> None:
    """Stops the server and starts it again, by default from its newest snapshot."""
    server.stop()
    server.ts_config = ts_config
    server.start()


def start_and_fail(server: ServerProcess) -> str:
    """Starts a server that cannot start; returns what it said."""
    before = len(server.output())
    server.start(ready=False)
    eventually(lambda: server.returncode is not None, within=60, what="end of the start")
    assert server.returncode == 1
    return server.output()[before:]


def test_files_of_a_run(server: ServerProcess) -> None:
    eventually(lambda: [file.name.split("-")[1] for file in files(server)] == ["startup.cfg"], within=20)
    assert recorded(files(server)[0])["modelCount"] == 0
    server.register("echo.mar", initial_workers=0)
    (snapshot,) = files(server, "snapshot")
    assert snapshot.stat().st_mode & 0o777 == 0o600
    manage(server, "PUT", "/models/echo?min_worker=1&synchronous=true")
    server.register("echo2.mar", initial_workers=0)
    manage(server, "PUT", "/models/echo/2.0/set-default")
    manage(server, "DELETE", "/models/echo/1.0")
    assert len(files(server, "snapshot")) == 5
    left = server.stop()
    assert not left
    (shutdown,) = files(server, "shutdown")
    assert all(NAME.fullmatch(file.name) for file in files(server))
    content = recorded(shutdown)
    assert content["name"] == shutdown.name
    assert content["modelCount"] == 1
    assert content["models"] == {
        "echo": {
            "2.0": {
                "defaultVersion": True,
                "marName": "echo2.mar",
                "minWorkers": 0,
                "maxWorkers": 0,
                "batchSize": 4,
                "maxBatchDelay": 7,
                "responseTimeout": 120,
                "startupTimeout": 120,
                "runtimeType": "python",
            }
        }
    }
    rows = settings(shutdown)
    assert rows["inference_address"] == f"http://127.0.0.1:{server.ports['inference']}"
    assert rows["enable_model_api"] == "true"
    # As scripts written for TorchServe read it.
    line = next(each for each in shutdown.read_text().splitlines() if each.startswith("model_snapshot="))
    assert json.loads(line.partition("=")[2].replace("\\:", ":").replace("\\n", "")) == content


@pytest.mark.slow
def test_a_plain_restart_brings_everything_back(server: ServerProcess) -> None:
    server.register("echo.mar", initial_workers=2, batch_size=3, max_batch_delay=9, response_timeout=30)
    server.register("echo2.mar", initial_workers=1)
    manage(server, "PUT", "/models/echo/2.0/set-default")
    server.register("other.mar", handler="second.py:other")
    assert server.register("sick.mar").status == 500
    assert recorded(files(server)[-1])["models"]["sick"]["1.0"]["minWorkers"] == 0
    restart(server)
    first, second = described(server, "echo/1.0"), described(server, "echo")
    assert second["modelVersion"] == "2.0"
    keys = ("minWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "loadedAtStartup", "modelUrl")
    assert [first[key] for key in keys] == [2, 3, 9, 30, False, "echo.mar"]
    assert [second[key] for key in keys] == [1, 4, 7, 120, False, "echo2.mar"]
    eventually(lambda: server.predict("other", b"x").body == b"other", within=30, what="the recorded handler")
    # A model whose workers failed is there too, without workers.
    assert described(server, "sick")["workers"] == []
    newest = files(server, "shutdown")[-1]
    assert f"Restoring 4 model versions from the snapshot {newest}" in server.output()
    # Killed, it writes no shutdown snapshot: the last operation's one counts.
    manage(server, "PUT", "/models/echo/1.0?min_worker=1&max_worker=1&synchronous=true")
    kill(server, "guard")
    server.stop()
    eventually(lambda: not server.processes(), within=20, what="the end of all others")
    server.start()
    assert described(server, "echo/1.0")["minWorkers"] == 1


@pytest.mark.slow
def test_models_are_ignored_where_a_snapshot_is_restored(store: Path) -> None:
    with ServerProcess(store=store, snapshots=True, arguments=["--models", "echo=echo.mar"]) as server:
        assert described(server, "echo")["loadedAtStartup"] is True
        assert not files(server, "snapshot")
        manage(server, "DELETE", "/models/echo")
        restart(server)
        assert manage(server, "GET", "/models")["models"] == []
        assert "Model snapshot is empty. Starting TorchServe without initial models." in server.output()
        assert "not loading echo=echo.mar" in server.output()


@pytest.mark.slow
def test_a_named_snapshot_is_restored_without_writing_to_it(server: ServerProcess) -> None:
    server.register("echo.mar", initial_workers=0)
    server.stop()
    chosen = server.home / "chosen.cfg"
    text = files(server, "shutdown")[-1].read_text()
    # One of TorchServe's older ones does not say what runtime a model needs.
    chosen.write_text(re.sub(r",\\n *\"runtimeType\"\\: \"python\"", "", text))
    assert "runtimeType" not in chosen.read_text()
    chosen.chmod(0o444)
    server.ts_config = chosen
    server.start()
    assert described(server, "echo")["minWorkers"] == 0
    server.stop()
    # A missing archive stops the start.
    (server.store / "echo.mar").rename(server.home / "echo.mar")
    missing = "InvalidSnapshotException: Model archive file for model :echo, version :1.0 not found in model store"
    assert missing in start_and_fail(server)
    # One that is junk does not: the model is there, and says that it cannot work.
    (server.store / "echo.mar").write_bytes(b"junk")
    server.start()
    assert [each["modelName"] for each in manage(server, "GET", "/models")["models"]] == ["echo"]
    assert "The archive echo.mar of model echo cannot be read" in server.output()


@pytest.mark.slow
@pytest.mark.parametrize("is_registered", [True, False])
def test_a_model_that_cannot_be_restored_is_kept_for_the_next_start(server: ServerProcess, is_registered: bool) -> None:
    url = f"file://{server.home / 'far.mar'}"
    (server.home / "far.mar").write_bytes((server.store / "other.mar").read_bytes())
    server.register(url, initial_workers=0)
    server.register("echo.mar", initial_workers=0)
    server.stop()
    newest = files(server)[-1]
    text = newest.read_text()
    at = text.index('"other"')
    newest.write_text(text[:at] + text[at:].replace('runtimeType"\\: "python"', 'runtimeType"\\: "LSP"', 1))
    server.ts_config = None
    server.start()
    assert [each["modelName"] for each in manage(server, "GET", "/models")["models"]] == ["echo"]
    assert "Error while registering model. Details: other 1.0: Runtime LSP is not supported" in server.output()
    kept = recorded(files(server, "startup")[-1])
    assert kept["modelCount"] == 2
    assert kept["models"]["other"]["1.0"]["downloaded"] is True
    assert (server.store / "far.mar").exists()
    # Unregistered by hand it is forgotten, whether it was registered meanwhile or not.
    if is_registered:
        server.register("far.mar", initial_workers=0)
    assert manage(server, "DELETE", "/models/other") == {"status": 'Model "other" unregistered'}
    assert list(recorded(files(server, "snapshot")[-1])["models"]) == ["echo"]
    assert (server.store / "far.mar").exists() == is_registered, "what was fetched for it goes with it"
    assert server.request("management", "DELETE", "/models/other").status == 404


def test_no_snapshots(start_server: Callable[..., ServerProcess], store: Path) -> None:
    server = start_server(store=store)
    server.register("echo.mar", initial_workers=0)
    server.stop()
    assert files(server) == []


@pytest.mark.slow
def test_a_damaged_snapshot_stops_the_start_and_says_why(server: ServerProcess) -> None:
    server.register("echo.mar", initial_workers=0)
    server.stop()
    newest = files(server)[-1]
    text = newest.read_text()
    server.ts_config = None
    for damaged, reason in (
        (text[: text.index("echo.mar")], "not valid JSON"),
        (text.replace("echo.mar", "../echo.mar"), "marName is not allowed: ../echo.mar"),
        (text.replace('minWorkers"\\: 0', 'minWorkers"\\: "all"'), "minWorkers: 'all' is not a whole number"),
        ("inference_address=http://127.0.0.1:1\n", "a snapshot without the key model_snapshot"),
    ):
        newest.write_text(damaged)
        output = start_and_fail(server)
        assert reason in output
        assert newest.name in output


@pytest.mark.slow
def test_only_the_newest_files_are_kept_and_names_only_grow(server: ServerProcess) -> None:
    directory = server.home / "logs" / "config"
    ahead = "20991231235959998-snapshot.cfg"
    (directory / ahead).write_bytes(files(server)[0].read_bytes())
    for number in range(120):
        (directory / f"20200101000000{number:03d}-snapshot.cfg").write_text("x")
    server.register("echo.mar", initial_workers=0)
    kept = [file.name for file in files(server)]
    assert len(kept) == 100
    assert kept[-2:] == [ahead, "20991231235959999-snapshot.cfg"]
    assert not [name for name in os.listdir(directory) if name.startswith(".")]


def test_a_disk_that_is_full_is_told_of(server: ServerProcess) -> None:
    directory = server.home / "logs" / "config"
    directory.rename(server.home / "away")
    directory.touch()  # no directory: nothing can be written there
    reply = server.register("echo.mar", initial_workers=0)
    assert reply.status == 500
    assert reply.json()["message"].startswith("The change was made, but could not be recorded")
    directory.unlink()
    (server.home / "away").rename(directory)
    manage(server, "DELETE", "/models/echo")
    assert recorded(files(server, "snapshot")[-1])["modelCount"] == 0


def test_a_directory_that_is_removed_meanwhile_is_made_anew(server: ServerProcess) -> None:
    shutil.rmtree(server.home / "logs" / "config")
    assert server.register("echo.mar", initial_workers=0).status == 200
    (file,) = files(server)
    assert recorded(file)["modelCount"] == 1
    shutil.rmtree(server.home / "logs")
    server.stop()
    (file,) = files(server)
    assert (file.name.endswith("-shutdown.cfg"), recorded(file)["modelCount"]) == (True, 1)
