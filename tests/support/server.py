"""A whole server as a subprocess: its own directory, ports, store and temp files; a census after its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support import http
from support.eventually import eventually
from support.processes import MARKER, Member, server_processes, shared_memory
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.plugins import testing

REPOSITORY = Path(__file__).resolve().parents[2]
START_LIMIT_S = 90.0
STOP_LIMIT_S = 60.0
#: For the registration of a model, whose Python environment may have to be made first.
REGISTER_LIMIT_S = 300.0
#: For tests with many workers or ranks that use torch: imported once, before they are forked.
WITH_TORCH = {"preload_modules": "torch"}
APIS = ("inference", "management", "metrics")
GRPC_APIS = ("grpc_inference", "grpc_management")
#: Ports for a server of a test.
free_ports = testing.free_ports

_LAUNCH = "import sys; from wsgi_ts.cli.commands import torchserve; sys.exit(torchserve())"
#: Becomes another program, as systemd starts one: the descriptors are those from 3 on, and the variables say so.
_HAND_OVER = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for place, fd in enumerate(fds, 3):
    os.dup2(fd, place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerProcess:
    """A server; a context manager that starts it, stops it with SIGTERM and looks for what it left behind.

    Args:
        store: a directory whose contents are copied to the server's model store; none: an empty store, which
            tests fill through `server.store`.
        config: further lines of config.properties.
        arguments: further arguments of `torchserve`.
        environment: further variables.
        web_workers: gunicorn workers of the inference API.
        combined: the inference and management APIs on one address.
        tls: the APIs that are served over TLS, each with what a client checks the server by.
        sockets: by their APIs' names, listening sockets that each start is handed as systemd does.
        snapshots: write snapshots, and start from one where `ts_config` is None.

    Attributes:
        ts_config: the file that the next start is given; None: none.
    """

    def __init__(
        self,
        *,
        store: Path | None = None,
        config: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        web_workers: int = 1,
        combined: bool = False,
        tls: Mapping[str, ssl.SSLContext] | None = None,
        snapshots: bool = False,
        sockets: Mapping[str, socket.socket] | None = None,
    ) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="wts-", dir="/tmp"))
        self.store = self.home / "store"
        if store is None:
            self.store.mkdir()
        else:
            shutil.copytree(store, self.store)
        (self.home / "tmp").mkdir()
        self.marker = uuid.uuid4().hex
        self.tls = dict(tls or {})
        names = (*APIS, *GRPC_APIS)
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.ports.update((api, sock.getsockname()[1]) for api, sock in (sockets or {}).items())
        if combined:
            self.ports["management"] = self.ports["inference"]
        self._config = {
            **{
                f"{api}_address": f"{'https' if api in self.tls else 'http'}://127.0.0.1:{port}"
                for api, port in self.ports.items()
                if api in APIS
            },
            **{f"{api}_port": str(self.ports[api]) for api in GRPC_APIS},
            "disable_token_authorization": "true",
            "enable_model_api": "true",
            "web_workers": str(web_workers),
            "slots_per_worker": "256",
            # Most handlers of the tests use no torch, whose import would be half of what a server's start costs.
            "preload_modules": "",
            **(config or {}),
        }
        self._arguments = [*([] if snapshots else ["--ncs"]), *arguments]
        self.ts_config: Path | None = self.home / "config.properties"
        self._environment = dict(environment or {})
        self._sockets = tuple((sockets or {}).values())
        self._process: subprocess.Popen[bytes] | None = None
        self._control: ControlPlane | None = None
        self._prefixes: set[str] = set()

    def __enter__(self) -> ServerProcess:
        try:
            self.start()
        except BaseException:
            self._kill_all()
            self._remove_home()
            raise
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        try:
            left = self.stop()
            if exception_type is None:
                assert not left, f"left behind after the stop: {left}\n{self.output()[-3000:]}"
        finally:
            self._kill_all()
            self._remove_home()

    # Life

    def start(self, *, ready: bool = True) -> None:
        """Starts the server in this object's directory; a start after a stop finds what the first one left.

        Args:
            ready: wait until it says that it has started and answers a ping.
        """
        config = self.home / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in self._config.items()))
        command = [sys.executable, "-c", _LAUNCH, "--start", "--foreground", "--model-store", os.fspath(self.store)]
        command += [] if self.ts_config is None else ["--ts-config", os.fspath(self.ts_config)]
        command += self._arguments
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        environment |= {
            MARKER: self.marker,
            "TMPDIR": os.fspath(self.home / "tmp"),
            "PYTHONPATH": os.fspath(REPOSITORY),
            # A process that sets its title must not write over the environment that carries the marker.
            "SPT_NOENV": "1",
            **self._environment,
        }
        fds = [each.fileno() for each in self._sockets]
        command = [sys.executable, "-c", _HAND_OVER, ",".join(map(str, fds)), *command] if fds else command
        self._started_lines = self.output().count("Model server started")
        with (self.home / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.home,
                env=environment,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        if ready:
            eventually(self._is_ready, within=START_LIMIT_S, what=f"start of the server in {self.home}")
            self._prefixes.add(self.prefix)

    def stop(self, number: int = signal.SIGTERM) -> list[str]:
        """Sends the launcher a signal, waits for the end, and returns what is left of the server.

        Raises:
            AssertionError: it did not end in time; everything is killed then.
        """
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is None:
            return []
        self.note_prefix()
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._kill_all()
            process.kill()
            process.wait()
            raise AssertionError(f"no end within {STOP_LIMIT_S} s\n{self.output()[-3000:]}") from None
        return self.leftovers()

    @property
    def returncode(self) -> int | None:
        """The launcher's exit status, None while it runs."""
        return None if self._process is None else self._process.poll()

    def leftovers(self) -> list[str]:
        """Processes and shared memory of this server that still exist."""
        running = [process for process in self.processes() if not process.is_killed]
        left = [f"{process.role} {process.pid}: {process.command}" for process in running]
        for prefix in self._prefixes:
            left += [f"/dev/shm/{name}" for name in shared_memory(prefix)]
        return left

    # Asking it

    def request(
        self,
        api: str,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | str | None = None,
        chunks: Iterable[bytes] | None = None,
        timeout: float = 60.0,
    ) -> http.Reply:
        """Sends one request to an API ("inference", "management" or "metrics") on a connection of its own."""
        port, tls = self.ports[api], self.tls.get(api)
        return http.request(port, method, path, headers=headers, body=body, chunks=chunks, timeout=timeout, tls=tls)

    def predict(self, model: str, body: bytes | str = b"", **headers: str) -> http.Reply:
        """Posts a prediction; keyword arguments are headers, with underscores for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named.setdefault("content-type", "application/octet-stream")
        return self.request("inference", "POST", f"/predictions/{model}", headers=named, body=body)

    def register(self, url: str, **arguments: object) -> http.Reply:
        """Registers an archive of the store, with one worker unless `initial_workers` says otherwise."""
        query = {"url": url, "initial_workers": 1, "synchronous": "true", **arguments}
        text = "&".join(f"{name}={value}" for name, value in query.items())
        return self.request("management", "POST", f"/models?{text}", body=b"", timeout=REGISTER_LIMIT_S)

    def raw(self, api: str = "inference", timeout: float = 60.0) -> http.RawConnection:
        """A socket to an API."""
        return http.RawConnection(self.ports[api], timeout, self.tls.get(api))

    @property
    def control(self) -> ControlPlane:
        """The supervisor's control socket."""
        if self._control is None:
            self._control = ControlPlane(self.run_dir)
        return self._control

    # Looking into it

    @property
    def run_dir(self) -> Path:
        """The instance's run directory."""
        return self.home / "tmp" / f"wsgi-ts-{os.getuid()}"

    @property
    def record(self) -> dict[str, Any]:
        """The instance's record.json."""
        record: dict[str, Any] = json.loads((self.run_dir / "record.json").read_text())
        return record

    @property
    def prefix(self) -> str:
        """What the instance's shared-memory names start with."""
        prefix: str = self.record["prefix"]
        return prefix

    def note_prefix(self) -> None:
        """Has the names of the present supervisor looked for at the end: each that the guard starts has others."""
        with contextlib.suppress(OSError, ValueError):
            if prefix := self.prefix:
                self._prefixes.add(prefix)

    def output(self) -> str:
        """What the launcher and the server printed so far."""
        path = self.home / "output.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def log(self, name: str = "ts_log.log") -> str:
        """The text of one log file, empty when there is none."""
        path = self.home / "logs" / name
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self, role: str | None = None) -> list[Member]:
        """The live processes of this server, or those of one role."""
        return [process for process in server_processes(self.marker) if role in (None, process.role)]

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.output()[-4000:]}")
        if self.output().count("Model server started") <= self._started_lines:
            return False
        try:
            # Status 500 is an answer too: models without workers make the server unhealthy, not unready.
            self.request("inference", "GET", "/ping", timeout=30)
            self.request("management", "GET", "/models", timeout=30)
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Kills what is left of the server and removes its shared memory; its home stays."""
        self._kill_all()

    def remove(self) -> None:
        """Kills what is left, and removes the home as well."""
        self._kill_all()
        self._remove_home()

    def _kill_all(self) -> None:
        self.note_prefix()
        for process in self.processes():
            process.kill()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        eventually(lambda: not self.processes(), within=10, what="end of the killed processes")
        for prefix in self._prefixes:
            for name in shared_memory(prefix):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"/dev/shm/{name}")

    def _remove_home(self) -> None:
        if "WSGI_TS_KEEP" not in os.environ:
            shutil.rmtree(self.home, ignore_errors=True)
