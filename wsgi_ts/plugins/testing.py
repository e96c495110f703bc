"""A server for the tests of a plugin: `pytest_plugins = ["wsgi_ts.plugins.testing"]`, and the fixture `plugin_server`.

Each server is a real one, in a folder of its own, on ports that nobody uses, with one small model `echo` that answers
with the request's body. It ends with the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_LIMIT_S = 240.0
STOP_LIMIT_S = 90.0
_APIS = ("inference", "management", "metrics")
_STARTED = "Model server started"
_COMMAND = "import sys; from wsgi_ts.cli.commands import wsgi_ts; sys.exit(wsgi_ts())"
_ECHO = "def handle(data, context):\n    return data and [row.get('body', b'') for row in data]\n"
_MANIFEST = {"runtime": "python", "model": {"modelName": "echo", "handler": "handler.py:handle", "modelVersion": "1.0"}}


@dataclass(frozen=True)
class Answer:
    """What a server has answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


class PluginServer:
    """A running server.

    Args:
        home: an empty folder for it.
        plugins: files or folders of plugins, which become its `plugins_path`.
        config: further keys of config.properties.
        environment: further environment variables.
        models: archives for its model store, besides `echo`.
    """

    def __init__(
        self,
        home: Path,
        *plugins: str | os.PathLike[str],
        config: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        models: tuple[Path, ...] = (),
    ) -> None:
        self.home = home
        store, folder = home / "store", home / "plugins"
        for each in (store, folder, home / "tmp"):
            each.mkdir(parents=True)
        with zipfile.ZipFile(store / "echo.mar", "w") as archive:
            archive.writestr("handler.py", _ECHO)
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(_MANIFEST))
        for model in models:
            (store / model.name).symlink_to(Path(model).resolve())
        for each in map(Path, plugins):
            (folder / each.name).symlink_to(each.resolve())
        ports = free_ports(len(_APIS) + 2)
        self.ports = dict(zip((*_APIS, "grpc_inference", "grpc_management"), ports, strict=True))
        keys = {
            **{f"{api}_address": f"http://127.0.0.1:{self.ports[api]}" for api in _APIS},
            **{f"{api}_port": str(self.ports[api]) for api in ("grpc_inference", "grpc_management")},
            "web_workers": "1",
            "slots_per_worker": "64",
            "preload_modules": "",
            "enable_model_api": "true",
            "disable_token_authorization": "true",
            "metrics_mode": "prometheus",
            **({"plugins_path": str(folder)} if plugins else {}),
            **(config or {}),
        }
        properties = home / "config.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in keys.items()), encoding="utf-8")
        self._command = [sys.executable, "-c", _COMMAND, "serve", "--ts-config", str(properties)]
        self._command += ["--model-store", str(store), "--run-dir", str(home / "run"), "--models", "all"]
        self._environment = {**os.environ, "TMPDIR": str(home / "tmp"), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str, wait_for_model: bool = True) -> None:
        """Starts it, and waits until it says so, and until `echo` is answered by something else than 503.

        The flags are those of `wsgi-ts serve`; by default `--ncs`, so that it neither reads nor writes snapshots.

        Raises:
            RuntimeError: it has ended instead; the message is what it has said.
        """
        said = self.output.count(_STARTED)
        with (self.home / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command, *(flags or ("--ncs",))],
                cwd=self.home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while self.output.count(_STARTED) == said:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server has not started:\n{self.output[-4000:]}")
            time.sleep(0.02)
        while wait_for_model and self.post("/predictions/echo", b"").status == 503 and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> int:
        """Stops it; returns the exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.terminate()
        try:
            return process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise

    @property
    def output(self) -> str:
        """What it has printed so far: its log, among other things."""
        path = self.home / "output.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def get(self, path: str, *, api: str = "inference", headers: Mapping[str, str] | None = None) -> Answer:
        """Asks an API: `inference`, `management` or `metrics`."""
        return self.request("GET", path, None, api=api, headers=headers)

    def post(
        self, path: str, body: bytes = b"", *, api: str = "inference", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends a body to an API."""
        return self.request("POST", path, body, api=api, headers=headers)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        api: str = "inference",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Sends a request."""
        url = f"http://127.0.0.1:{self.ports[api]}{path}"
        named = {"content-type": "application/octet-stream", **(headers or {})} if body is not None else headers or {}
        request = urllib.request.Request(url, data=body, method=method, headers=dict(named))
        try:
            with urllib.request.urlopen(request, timeout=START_LIMIT_S) as answer:
                return Answer(answer.status, dict(answer.headers.items()), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers.items()), error.read())


class PluginServers:
    """What the fixture is: called with plugins, it starts a server with them."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._running: list[PluginServer] = []

    def __call__(self, *plugins: str | os.PathLike[str], flags: tuple[str, ...] = (), **options: Any) -> PluginServer:
        """Starts a server; arguments as of `PluginServer` and its `start`."""
        server = PluginServer(self._home / f"server-{len(self._running)}", *plugins, **options)
        self._running.append(server)
        server.start(*flags)
        return server

    def close(self) -> None:
        """Stops all of them."""
        for server in self._running:
            server.stop()


@pytest.fixture
def plugin_server(tmp_path: Path) -> Iterator[PluginServers]:
    """Starts servers: `plugin_server("my_plugin.py", config={"job_queue_size": "5"})`."""
    servers = PluginServers(tmp_path)
    with contextlib.closing(servers):
        yield servers


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different.

    Below those that the kernel gives to clients: between this look and the server's start a connection of a test that
    runs at the same time cannot take one. And each of the processes that pytest-xdist runs tests in draws from a part
    of its own, so that a server that is stopped for a moment finds its ports free.
    """
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ours = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(range(10_000 + ours, first_of_clients, processes))
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            found += [] if port in found else [port]
    return found
