"""Where a running server takes models from: store, URLs, directories; and what it starts with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.archives import ECHO, archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess

ENVIRONMENT = """
import json, os

def handle(data, context):
    if data is None:
        return None
    return [json.dumps(dict(os.environ) | {"cwd": os.getcwd()}) for _ in data]
"""
#: What OpenBLAS, and torch, would use if they were asked to compute.
THREADS = """
import ctypes, json, os, re
import numpy
import torch

def handle(data, context):
    if data is None:
        return None
    with open("/proc/self/maps") as maps:
        paths = set(re.findall(r"(/\\S*openblas\\S*)", maps.read()))
    found = {"torch": torch.get_num_threads()}
    for path in paths:
        for name in ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads", "openblas_get_num_threads"):
            if hasattr(ctypes.CDLL(path), name):
                found[os.path.basename(path)] = getattr(ctypes.CDLL(path), name)()
    return [json.dumps(found) for _ in data]
"""


class Origin:
    """A web server whose answers the test decides: path → status, headers, body; it counts what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.seen: list[str] = []
        origin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                origin.seen.append(self.path)
                status, headers, body = origin.answers[self.path]
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the test's output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: bytes = b"", status: int = 200, **headers: str) -> str:
        self.answers[path] = (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)
        return self.address + path

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    origin = Origin()
    yield origin
    origin.close()


@pytest.fixture(scope="module")
def other() -> Iterator[Origin]:
    """An origin that is not allowed."""
    origin = Origin()
    yield origin
    origin.close()


MODELS = {
    "tuned": {"1.0": {"defaultVersion": True, "marName": "tuned.mar", "minWorkers": 2, "maxWorkers": 3, "batchSize": 6}}
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, origin: Origin) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("place")
    store = root / "store"
    store.mkdir()
    archive(store, "tuned")
    archive(store, "plain")
    archive(store, "env", ENVIRONMENT)
    archive(store, "threads", THREADS, config_yaml="minWorkers: 2\nmaxWorkers: 2\n")
    make_directory(store / "folder", "folder")
    make_directory(root / "outside", "outside")
    config = {
        "allowed_urls": rf"{origin.address}/.*,file://{root}/files/.*",
        "models": json.dumps(MODELS),
        "default_workers_per_model": "1",
        "blacklist_env_vars": ".*SECRET|HOME",
        "ipex_enable": "true",
        "ts_header_key_sequence_id": "my_sequence",
        "decode_input_request": "false",
    }
    arguments = ["--models", "tuned.mar", f"named={root / 'outside'}", "nothere.mar", "threads=threads.mar"]
    environment = {"MY_SECRET": "x", "SHOWN": "z", "SECRETS_NO": "y", "PYTHONWARNINGS": "ignore"}
    with ServerProcess(store=store, config=config, arguments=arguments, environment=environment) as running:
        (root / "files").mkdir()
        yield running


@pytest.fixture
def place(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with `outside` and `files` in it."""
    return Path(next(word for word in server._arguments if word.startswith("named=")).removeprefix("named=")).parent


def make_directory(path: Path, name: str) -> None:
    (path / "MAR-INF").mkdir(parents=True)
    model = {"modelName": name, "modelVersion": "1.0", "handler": "handler.py:handle"}
    (path / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"runtime": "python", "model": model}))
    (path / "handler.py").write_text(ECHO)


def register(server: ServerProcess, url: str, **arguments: object) -> Reply:
    return server.register(quote(url, safe=""), **{"initial_workers": 0, **arguments})


def describe(server: ServerProcess, name: str) -> dict[str, Any]:
    model: dict[str, Any] = server.request("management", "GET", f"/models/{name}").json()[0]
    return model


def unregister(server: ServerProcess, name: str) -> None:
    assert server.request("management", "DELETE", f"/models/{name}", body=b"").status == 200


def left_in_store(server: ServerProcess) -> set[str]:
    return set(os.listdir(server.store)) - {"tuned.mar", "plain.mar", "env.mar", "threads.mar", "folder"}


def refused(server: ServerProcess, url: str, status: int, text: str) -> None:
    reply = register(server, url)
    assert (reply.status, reply.json()["message"]) == (status, text), reply.text
    assert left_in_store(server) == set()


def test_startup_models(server: ServerProcess) -> None:
    tuned, named = describe(server, "tuned"), describe(server, "named")
    assert [tuned[key] for key in ("minWorkers", "maxWorkers", "batchSize", "loadedAtStartup")] == [2, 3, 6, True]
    assert (named["minWorkers"], named["loadedAtStartup"]) == (1, True)
    eventually(lambda: "Failed to load model: nothere.mar" in server.output(), within=20)
    eventually(lambda: server.predict("named", b"here").body == b"here", within=60, what="the directory's model")


def test_default_workers_of_a_registration(server: ServerProcess) -> None:
    reply = server.request("management", "POST", "/models?url=plain.mar&synchronous=true", body=b"", timeout=60)
    assert reply.json()["status"] == 'Model "plain" Version: 1.0 registered with 1 initial workers'
    assert describe(server, "plain")["loadedAtStartup"] is False
    unregister(server, "plain")


def test_directories_over_the_api(server: ServerProcess, place: Path) -> None:
    assert register(server, "folder").status == 200
    unregister(server, "folder")
    assert (server.store / "folder").is_dir()
    # A path names its last part's entry of the store.
    assert register(server, str(place / "files" / "folder")).status == 200
    unregister(server, "folder")
    for outside in (str(place / "outside"), "/etc", "/"):
        refused(server, outside, 404, f"Model not found at: {outside}")


def test_a_download_and_its_end(server: ServerProcess, origin: Origin, tmp_path: Path) -> None:
    body = archive(tmp_path, "far").read_bytes()
    url = origin.answer("/far.mar", body)
    assert register(server, url, s3_sse_kms="true").status == 200
    assert describe(server, "far")["modelUrl"] == url
    assert left_in_store(server) == {"far.mar"}
    asked = len(origin.seen)
    reply = register(server, url)
    assert (reply.status, reply.json()["message"]) == (500, "Model file already exists far.mar")
    assert len(origin.seen) == asked
    assert f"Downloaded {url}: {len(body)} bytes" in server.output()
    unregister(server, "far")
    assert left_in_store(server) == set()


def test_a_downloaded_archive_is_in_the_store(server: ServerProcess, origin: Origin, tmp_path: Path) -> None:
    url = origin.answer("/fetched.mar", archive(tmp_path, "fetched").read_bytes())
    assert register(server, url, model_name="mine").status == 200
    reply = register(server, "fetched.mar", model_name="mine")
    assert (reply.status, reply.json()["type"]) == (409, "ConflictStatusException")
    # Another model that is made from it keeps it: a snapshot with that one could not be restored without it.
    assert register(server, "fetched.mar", model_name="yours").status == 200
    unregister(server, "mine")
    assert left_in_store(server) == {"fetched.mar"}
    unregister(server, "yours")
    assert left_in_store(server) == set()


def test_an_archive_of_a_version_that_is_there_already_stays_in_the_store(
    server: ServerProcess, origin: Origin, tmp_path: Path
) -> None:
    assert register(server, origin.answer("/first.mar", archive(tmp_path, "first").read_bytes())).status == 200
    url = origin.answer("/second.mar", archive(tmp_path, "first", file_name="second.mar").read_bytes())
    reply = register(server, url)
    assert (reply.status, reply.json()["type"]) == (409, "ConflictStatusException")
    assert register(server, "second.mar").status == 409
    assert left_in_store(server) == {"first.mar", "second.mar"}
    unregister(server, "first")
    assert register(server, "second.mar").status == 200
    unregister(server, "first")
    assert left_in_store(server) == {"second.mar"}
    (server.store / "second.mar").unlink()


def test_a_downloaded_model_that_cannot_start_keeps_its_archive(
    server: ServerProcess, origin: Origin, tmp_path: Path
) -> None:
    url = origin.answer("/sick.mar", archive(tmp_path, "sick", "raise ValueError('sick')").read_bytes())
    assert register(server, url, initial_workers=1).status == 500
    assert register(server, "sick.mar").status == 409
    assert left_in_store(server) == {"sick.mar"}
    unregister(server, "sick")
    assert left_in_store(server) == set()


def test_a_file_that_is_no_archive(server: ServerProcess) -> None:
    garbage = server.store / "garbage.mar"
    garbage.write_text("garbage\n")
    reply = server.request("management", "POST", "/models?url=garbage.mar")
    assert (reply.status, reply.json()["type"]) == (400, "InvalidModelException")
    assert reply.json()["message"] == "Model name is not defined."
    eventually(
        lambda: "garbage.mar: Model archive is neither zip nor tar.gz." in server.log(), within=30, what="the reason"
    )
    reply = server.request("management", "POST", "/models?url=garbage.mar&model_name=garbage")
    assert (reply.status, reply.json()["message"]) == (400, "Model archive is neither zip nor tar.gz.")
    assert server.request("management", "GET", "/models/garbage").status == 404
    garbage.unlink()


def test_a_tar_and_a_file_url(server: ServerProcess, origin: Origin, place: Path, tmp_path: Path) -> None:
    make_directory(tmp_path / "packed", "packed")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(tmp_path / "packed", "packed")
    assert register(server, origin.answer("/packed.tar.gz", buffer.getvalue())).status == 200
    unregister(server, "packed")
    archive(place / "files", "local")
    assert register(server, f"file://{place}/files/local.mar").status == 200
    unregister(server, "local")
    assert (place / "files" / "local.mar").exists()


def test_what_cannot_be_fetched_leaves_nothing(server: ServerProcess, origin: Origin, tmp_path: Path) -> None:
    body = archive(tmp_path, "cut").read_bytes()
    for url in (
        origin.answer("/m404.mar", b"no such page", status=404),
        origin.answer("/m500.mar", status=500),
        origin.answer("/cut.mar", body[:-9], Content_Length=str(len(body))),
        origin.answer("/huge.mar", body, Content_Length=str(1 << 50)),
        origin.answer("/zipped.mar", body, Content_Encoding="gzip"),
        origin.answer("/loop.mar", status=302, Location="/loop.mar"),
    ):
        refused(server, url, 400, f"Failed to download archive from: {url}")
    assert origin.seen.count("/loop.mar") == 6
    junk = register(server, origin.answer("/page.mar", b"<html>"))
    assert (junk.status, junk.json()["type"]) == (400, "InvalidModelException")
    assert left_in_store(server) == set()


def test_places_that_are_not_allowed_get_no_byte(server: ServerProcess, origin: Origin, other: Origin) -> None:
    port = other.server.server_address[1]
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "017700000001", "localhost."):
        url = f"http://{host}:{port}/m.mar"
        refused(server, url, 404, f"Given URL {url} does not match any allowed URL(s)")
    refused(server, "file:///etc/m.mar", 404, "Given URL file:///etc/m.mar does not match any allowed URL(s)")
    # Of other schemes only the file name counts, as TorchServe reads them.
    for scheme in ("ftp://127.0.0.1", "gopher://x", "s3://bucket", "jar:file://", "file:", "http:/x"):
        refused(server, f"{scheme}/m.mar", 404, f"Model not found at: {scheme}/m.mar")
    # Allowed at first sight only.
    for number, location in enumerate((f"{other.address}/m.mar", "file:///etc/passwd", f"//127.0.0.1:{port}/m.mar")):
        refused_url = origin.answer(f"/hop{number}.mar", status=302, Location=location)
        refused(server, refused_url, 400, f"Failed to download archive from: {refused_url}")
    assert other.seen == []


def test_ways_up(server: ServerProcess, origin: Origin) -> None:
    asked = len(origin.seen)
    ways = (f"{origin.address}/../m.mar", f"{origin.address}/..%2fm.mar", "../store/plain.mar", "folder/../plain.mar")
    for url in ways:
        refused(server, url, 404, f"Relative path is not allowed in url: {url}")
    assert len(origin.seen) == asked


def test_the_environment_of_a_worker(server: ServerProcess) -> None:
    assert register(server, "env.mar", initial_workers=1).status == 200
    seen = json.loads(server.predict("env").body)
    unregister(server, "env")
    assert "MY_SECRET" not in seen
    assert "HOME" not in seen
    # The whole name has to match.
    assert seen["SECRETS_NO"] == "y"
    assert seen["SHOWN"] == "z"
    assert seen["TS_DECODE_INPUT_REQUEST"] == "false"
    assert seen["TS_IPEX_ENABLE"] == "true"
    assert seen["TS_IPEX_GPU_ENABLE"] == "false"
    assert seen["TS_REQUEST_SEQUENCE_ID"] == "my_sequence"
    assert seen["TS_REQUEST_SEQUENCE_START"] == "ts_request_sequence_start"
    assert seen["cwd"] in seen["PYTHONPATH"].split(os.pathsep)
    assert Path(seen["cwd"]).parent == server.run_dir / "models"
    # Not in what the kernel remembers of a process's start either.
    workers = server.processes("model-worker")
    assert workers
    for process in workers:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the model's own one, which has just ended
            assert b"MY_SECRET" not in Path(f"/proc/{process.pid}/environ").read_bytes()


@pytest.mark.skipif("OMP_NUM_THREADS" in os.environ, reason="whoever runs the tests has said how many threads")
def test_threads_of_a_workers_libraries(server: ServerProcess) -> None:
    eventually(lambda: server.predict("threads").status == 200, within=60, what="the model")
    found = json.loads(server.predict("threads").body)
    assert any("openblas" in name for name in found)
    # There are two workers at least, so none may use more than half of the cores.
    assert len(set(found.values())) == 1
    assert found["torch"] <= max(1, len(os.sched_getaffinity(0)) // 2)
