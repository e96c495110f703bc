"""Archives and settings as TorchServe's users have them, registered with a real server, which serves them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from corpus.users.archives import ARCHIVES, HANDLER, MANIFEST_NAME, UsersArchive, folder
from corpus.users.settings import ENTRY
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

#: A manifest without a version, by a packer that wrote its own path; the runtime as its source spells it.
OLD = {"runtime": "Python", "model": {"modelName": "old", "handler": "/home/user/code/handler.py:handle"}}
#: As TorchServe 0.12 writes a snapshot of the model `kept`.
SNAPSHOT = (
    "#Saving snapshot\n#Thu Jun 05 14:03:11 UTC 2025\nload_models=kept\\=kept.mar\nversion=0.12.0\nnumber_of_gpu=0\n"
    'model_snapshot={\\n  "name"\\: "20250605140311123-startup.cfg",\\n  "modelCount"\\: 1,\\n  "models"\\: {\\n'
    '    "kept"\\: {\\n      "1.0"\\: {\\n        "defaultVersion"\\: true,\\n        "marName"\\: "kept.mar",\\n'
    '        "minWorkers"\\: 1,\\n        "maxWorkers"\\: 1,\\n        "batchSize"\\: 4,\\n'
    '        "maxBatchDelay"\\: -10000,\\n        "runtimeType"\\: "python"\\n      }\\n    }\\n  }\\n}\n'
)
#: Those whose handlers are loaded here; the others differ from them in nothing that a worker sees.
SERVED = ("handler-in-a-folder.mar", "newer-file-appended.mar", "backslashes.mar", "one-top-folder.mar")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that was started from a snapshot of TorchServe, with all the archives in its store."""
    store = tmp_path_factory.mktemp("store")
    for case in ARCHIVES:
        case.build(store / case.name)
    folder([(MANIFEST_NAME, json.dumps(OLD).encode()), ("handler.py", HANDLER)])(store / "old")
    archive(store, "kept")
    archive(store, "tuned", config_yaml="batchSize: '4'\nmaxBatchDelay: 50.0\nminWorkers: '0'\n")
    archive(store, "m", file_name="m.mar")
    running = ServerProcess(store=store, config={"models": "{m: {'1.0': {batchSize: '4', maxBatchDelay: 50.0}}}"})
    lines = "".join(f"{key}={value}\n" for key, value in running._config.items())
    running.ts_config = running.home / "20250605140311123-startup.cfg"
    running.ts_config.write_text(SNAPSHOT + lines)
    with running:
        yield running


def describe(server: ServerProcess, name: str) -> dict[str, Any]:
    model: dict[str, Any] = server.request("management", "GET", f"/models/{name}").json()[0]
    return model


def unregister(server: ServerProcess, name: str) -> None:
    assert server.request("management", "DELETE", f"/models/{name}", body=b"").status == 200


def test_a_snapshot_of_torchserve(server: ServerProcess) -> None:
    kept = describe(server, "kept")
    assert [kept[key] for key in ("minWorkers", "batchSize", "maxBatchDelay", "runtime")] == [1, 4, 0, "python"]
    eventually(lambda: server.predict("kept", b"here").body == b"here", within=60, what="the snapshot's model")


@pytest.mark.parametrize("case", ARCHIVES, ids=lambda case: case.name)
def test_archives_of_users_are_registered(server: ServerProcess, case: UsersArchive) -> None:
    is_served = case.name in SERVED
    reply = server.register(quote(case.name), model_name="users", initial_workers=int(is_served))
    assert reply.status == 200, reply.text
    assert describe(server, "users")["modelVersion"] == "1.0"
    if is_served:
        assert server.predict("users", b"here").body == b"here"
    unregister(server, "users")
    assert not [path for path in (server.run_dir / "models").iterdir() if path.name != kept_folder(server)]


def kept_folder(server: ServerProcess) -> str:
    """The folder of the one model that stays."""
    (found,) = {path.name for path in (server.run_dir / "models").iterdir() if (path / "handler.py").is_file()}
    return found


def test_an_old_manifest(server: ServerProcess) -> None:
    reply = server.register("old")
    assert reply.json()["status"] == 'Model "old" Version: 1.0 registered with 1 initial workers'
    assert describe(server, "old")["runtime"] == "python"
    assert server.predict("old", b"here").body == b"here"
    unregister(server, "old")


def test_a_path_for_a_handler_and_the_runtime_in_capitals(server: ServerProcess) -> None:
    reply = server.register("m.mar", handler="/home/user/handler.py:handle", runtime="PYTHON", model_name="other")
    assert reply.status == 200, reply.text
    assert server.predict("other", b"here").body == b"here"
    unregister(server, "other")


@pytest.mark.parametrize("name", ["m", "tuned"])
def test_numbers_in_quotes_are_numbers(server: ServerProcess, name: str) -> None:
    assert server.register(f"{name}.mar", initial_workers=0).status == 200
    found = describe(server, name)
    assert {key: found[key] for key in ("batchSize", "maxBatchDelay")} == {
        key: ENTRY[key] for key in ("batchSize", "maxBatchDelay")
    }
    unregister(server, name)


def test_a_register_body_by_hand(server: ServerProcess) -> None:
    headers = {"content-type": "application/json"}
    body = "{'url': 'm.mar', model_name = byhand; batch_size: '3', initial_workers: 0.0,}"
    assert server.request("management", "POST", "/models", headers=headers, body=body).status == 200
    assert describe(server, "byhand")["batchSize"] == 3
    unregister(server, "byhand")


def test_arguments_that_cannot_be_meant_count_as_absent_but_for_those_in_json(server: ServerProcess) -> None:
    query = urlencode({"url": "m.mar", "initial_workers": "0", "batch_size": "many", "synchronous": "maybe"})
    assert server.request("management", "POST", f"/models?{query}", body=b"").status == 200
    assert describe(server, "m")["batchSize"] == ENTRY["batchSize"]
    unregister(server, "m")
    for name, value in (("batch_size", "many"), ("synchronous", "maybe")):
        wanted = "a whole number" if name == "batch_size" else "true or false"
        assert f"Parameter {name} must be {wanted}: '{value}' is" in server.log()
    headers = {"content-type": "application/json"}
    body = json.dumps({"url": "m.mar", "batch_size": "many"}).encode()
    reply = server.request("management", "POST", "/models", headers=headers, body=body)
    assert (reply.status, reply.json()["message"]) == (
        400,
        "Parameter batch_size must be a whole number: 'many' is not a whole number.",
    )
    assert server.request("management", "GET", "/models/m").status == 404


def test_a_value_that_cannot_be_meant_stops_the_start(tmp_path: Path) -> None:
    server = ServerProcess(config={"models": '{"m": {"1.0": {"batchSize": "many"}}}'})
    try:
        server.start(ready=False)
        eventually(lambda: server.returncode is not None, within=30, what="the end of the start")
        assert server.returncode == 1
        assert "key models: model 'm', version '1.0': batchSize: 'many' is not a whole number" in server.output()
    finally:
        server.stop()
        server._remove_home()
