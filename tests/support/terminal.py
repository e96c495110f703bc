"""A tutorial's reader at a terminal: a folder of their own, commands typed as printed, a server in the background."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from support import http
from support.eventually import eventually
from support.made import make_once
from support.processes import MARKER, server_processes, shared_memory
from support.server import REPOSITORY, START_LIMIT_S, free_ports

EXAMPLES = REPOSITORY / "examples"
#: TorchServe's ports, which the tutorials name.
USUAL_PORTS = ("8080", "8081", "8082")
_COMMAND_LIMIT_S = 300.0
#: How long a command may take until its first process is there, in seconds.
BEGIN_LIMIT_S = 60.0


class Terminal:
    """A context manager; at its end the server is stopped and looked for what it left behind.

    In everything that is typed or written, TorchServe's three ports are replaced by free ones, and nothing else; a
    configuration that is written gets free ports for gRPC.
    """

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="wts-", dir="/tmp"))
        (self.home / "tmp").mkdir()
        self.marker = uuid.uuid4().hex
        *ports, inference, management = map(str, free_ports(len(USUAL_PORTS) + 2))
        self._ports = dict(zip(USUAL_PORTS, ports, strict=True))
        self._grpc_ports = f"grpc_inference_port={inference}\ngrpc_management_port={management}\n"
        self._prefixes: set[str] = set()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        self._environment = inherited | {
            MARKER: self.marker,
            "TMPDIR": os.fspath(self.home / "tmp"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests' / 'support' / 'torchvision_cpu'}",
            # A process that sets its title must not write over the environment that carries the marker.
            "SPT_NOENV": "1",
            "HF_HUB_OFFLINE": "1",
            "CURL_HOME": os.fspath(self.home),
        }

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        try:
            self.type("torchserve --stop --foreground")
            left = [process.command for process in server_processes(self.marker) if not process.is_killed]
            left += [f"/dev/shm/{name}" for prefix in self._prefixes for name in shared_memory(prefix)]
            if exception_type is None:
                assert not left, f"left behind after the stop: {left}\n{self.output()[-3000:]}"
        finally:
            for process in server_processes(self.marker):
                process.kill()
            if "WSGI_TS_KEEP" not in os.environ:
                shutil.rmtree(self.home, ignore_errors=True)

    def write(self, name: str, text: str) -> Path:
        """Writes a file into the folder."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "inference_address=" in text:
            text += self._grpc_ports
        path.write_text(self._with_free_ports(text), encoding="utf-8")
        return path

    def configure(self, text: str = "", **keys: str) -> None:
        """Writes config.properties, which a server that is started here reads; without a text on the free ports."""
        addresses = zip(("inference", "management", "metrics"), USUAL_PORTS, strict=True)
        text = text or "".join(f"{api}_address=http://127.0.0.1:{port}\n" for api, port in addresses)
        self.write("config.properties", text + "".join(f"{key}={value}\n" for key, value in keys.items()))

    def copy(self, source: Path, name: str) -> None:
        """Copies a file of the examples or a printed one to a name in the folder."""
        target = self.home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    def type(self, command: str, *, status: int = 0) -> str:
        """Has a shell run a command, checks its exit status, and returns what it printed on standard output.

        A script of the examples that makes or trains a model is run once for all terminals; the next one gets a copy
        of what it made.
        """
        return make_once(command, self.home, lambda: self._run(command, status))

    def _run(self, command: str, status: int) -> str:
        # Files, not pipes: a server that is started in the background keeps what it inherits open.
        with tempfile.TemporaryFile() as printed, (self.home / "terminal.log").open("ab") as log:
            done = subprocess.run(
                ["bash", "-c", self._with_free_ports(command)],
                cwd=self.home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log if command.startswith("torchserve --start") else printed,
                stderr=log,
                timeout=_COMMAND_LIMIT_S,
                check=False,
            )
            printed.seek(0)
            text = printed.read().decode()
        assert done.returncode == status, f"{command}: status {done.returncode}\n{text}\n{self.output()[-3000:]}"
        return text

    def export(self, name: str, value: str) -> None:
        """Sets an environment variable; `$NAME` in it stands for what it was before."""
        self._environment[name] = value.replace(f"${name}", self._environment.get(name, ""))

    def start_server(self, command: str) -> None:
        """Types a command that starts the server, and waits until it says that it has started."""
        before = self.output().count("Model server started")
        self.type(command)
        # With "&" at its end a command returns before the shell has started it.
        begins_by = time.monotonic() + BEGIN_LIMIT_S

        def started() -> bool:
            if not server_processes(self.marker) and time.monotonic() > begins_by:
                raise RuntimeError(f"the server has ended: {command}\n{self.output()[-4000:]}")
            return self.output().count("Model server started") > before

        eventually(started, within=START_LIMIT_S, what=f"start: {command}")
        record = self.home / "tmp" / f"wsgi-ts-{os.getuid()}" / "record.json"
        self._prefixes.add(json.loads(record.read_text())["prefix"])

    def wait_for_end(self) -> None:
        """Waits until no process of the server is left, as a reader does before starting it again."""
        eventually(lambda: not server_processes(self.marker), within=30, what="end of the server")

    def wait_for_workers(self, model: str, count: int | None = None) -> None:
        """Waits until all workers of a model's default version are ready, at least one or exactly so many."""

        def ready() -> bool:
            reply = self.request("8081", "GET", f"/models/{model}")
            states = [worker["status"] for worker in reply.json()[0]["workers"]] if reply.status == 200 else []
            return bool(states) and states == ["READY"] * (len(states) if count is None else count)

        eventually(ready, within=START_LIMIT_S, what=f"ready workers of {model}")

    def request(self, port: str, method: str, path: str, body: bytes | None = None) -> http.Reply:
        """Sends one request to the API that a tutorial finds at this port."""
        return http.request(int(self._ports[port]), method, path, body=body)

    def output(self) -> str:
        """What the server and the commands printed besides their answers."""
        path = self.home / "terminal.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _with_free_ports(self, text: str) -> str:
        for usual, free in self._ports.items():
            text = text.replace(f":{usual}", f":{free}")
        return text

    def make(self, script: str, folder: str = ".") -> None:
        """Runs a script of the examples, with a folder here as its argument."""
        self.type(f"python {EXAMPLES / script} {folder}")
