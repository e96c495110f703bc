"""The servers of the harness, ours and others: started, killed, looked at and stopped in the same way.

The others are installed and started by `benchmarks/servers.py` and `benchmarks/rivals`. What their processes are is
told by what these have open: who has the ledger is a model worker, who listens is a web worker, the first one is the
main process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from archive_server import ArchiveServer, archive
from rivals import torchserve
from rivals.litserve import LitServeServer
from rivals.mosec import MosecServer
from servers import Server
from support import http
from support.eventually import eventually
from support.processes import MARKER, Member, marked
from support.server import ServerProcess

from reliability import census
from reliability.load import APPS, ledger_server

#: A model that comes and goes.
PASSING = "passing"
#: How long a rival has to end after it was asked to.
END_S = 60.0


class Subject(ABC):
    """A server with the ledger behind `path`; `stop` and `start` may follow each other.

    Attributes:
        name: as the tables have it.
        folder: where the ledger lies.
        path: of predictions.
        ports: that of its inference API.
        marker: what its processes carry in their environment.
    """

    name: str
    path: str
    ports: dict[str, int]
    marker: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def start(self) -> None:
        """Starts it and waits for an answer."""

    @abstractmethod
    def processes(self, role: str | None = None) -> list[Member]:
        """Its live processes, or those of one role."""

    @abstractmethod
    def end(self, number: int) -> None:
        """Sends the process that a user stops a signal; does not wait."""

    @abstractmethod
    def discard(self) -> None:
        """Kills what is left of it and forgets it."""

    def remove(self) -> None:
        """Discards it, and what it has on disk."""
        self.discard()

    @property
    @abstractmethod
    def is_up(self) -> bool:
        """Whether the process that a service manager watches is there."""

    def management_port(self) -> int | None:
        """Of TorchServe's management API, for those who have it."""
        return None

    def register_and_forget(self) -> bool:
        """Has one more model come and go; False where there is no management API.

        Raises:
            AssertionError: one of the calls failed.
        """
        port = self.management_port()
        if port is None:
            return False
        query = f"url=ledger.mar&model_name={PASSING}&initial_workers=1&synchronous=true"
        for method, path in (("POST", f"/models?{query}"), ("DELETE", f"/models/{PASSING}")):
            reply = http.request(port, method, path, body=b"", timeout=120.0)
            assert reply.status == 200, f"{method} {path}: {reply.text}"
        return True

    def whole(self) -> Counter[str]:
        """How many processes of each role a client depends on."""
        return Counter(each.role for each in self.processes())

    def take_census(self) -> census.Census:
        """What it holds."""
        return census.take(self.marker)


class Ours(Subject):
    """wsgi-ts, with two web workers and two model workers."""

    name = "wsgi-ts"
    path = "/predictions/ledger"

    def __init__(self, folder: Path, variables: Mapping[str, str], *, workers: int = 2, batch_size: int = 4) -> None:
        super().__init__(folder)
        self.server: ServerProcess = ledger_server(
            folder,
            workers=workers,
            batch_size=batch_size,
            web_workers=2,
            environment=variables,
        )
        self.ports = self.server.ports
        self.marker = self.server.marker

    def start(self) -> None:
        self.server.start()
        eventually(lambda: self.processes("model-worker"), within=60, what="the model worker")
        eventually(lambda: self.server.predict("ledger", b"x" * 32).status == 200, within=60, what="an answer")

    def processes(self, role: str | None = None) -> list[Member]:
        return self.server.processes(role)

    def management_port(self) -> int:
        return self.ports["management"]

    def end(self, number: int) -> None:
        self.server.note_prefix()
        for guard in self.processes("guard"):
            guard.kill(number)

    def discard(self) -> None:
        self.server.kill()

    def remove(self) -> None:
        self.server.remove()

    @property
    def is_up(self) -> bool:
        return self.server.returncode is None


class Other(Subject):
    """A rival.

    Args:
        name: as the tables have it.
        folder: where the ledger lies.
        ms: how long a batch takes.
        batch_size: where it makes batches.
    """

    def __init__(self, name: str, folder: Path, ms: int, batch_size: int) -> None:
        super().__init__(folder)
        self.name = name
        self.marker = uuid.uuid4().hex
        variables = {MARKER: self.marker, "WSGI_TS_LEDGER": os.fspath(folder), "WSGI_TS_LEDGER_MS": str(ms)}
        self._server = RIVALS[name](variables, batch_size)
        self.path = self._server.path("ledger")
        self.ports = {"inference": int(self._server.inference.rpartition(":")[2])}

    def management_port(self) -> int | None:
        if isinstance(self._server, ArchiveServer):
            return int(self._server.management.rpartition(":")[2])
        return None

    def start(self) -> None:
        self._server.__enter__()
        eventually(lambda: self.processes("model-worker"), within=60, what="a worker with the ledger open")

    def processes(self, role: str | None = None) -> list[Member]:
        rows = marked(self.marker)
        main = -1
        with contextlib.suppress(OSError, ValueError):
            main = self._server.pid()
        found = []
        for process in rows:
            with contextlib.suppress(psutil.Error, OSError):
                name = self._role(process, main)
                found.append(Member(process.pid, process.ppid(), name, " ".join(process.cmdline())))
        return [each for each in found if role in (None, each.role)]

    def whole(self) -> Counter[str]:
        # Some have helpers that come and go.
        return Counter(each.role for each in self.processes() if each.role != "helper")

    def _role(self, process: psutil.Process, main: int) -> str:
        if process.pid == main:
            return "main"
        folder = Path(f"/proc/{process.pid}/fd")
        open_files = [os.readlink(entry) for entry in folder.iterdir() if entry.is_symlink()]
        if os.fspath(self.folder / "ledger") in open_files:
            return "model-worker"
        ports = {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
        return "web-worker" if self.ports["inference"] in ports else "helper"

    def end(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._server.ask_to_stop()
            return
        with contextlib.suppress(OSError, ValueError):
            os.kill(self._server.pid(), number)

    def discard(self) -> None:
        for process in marked(self.marker):
            with contextlib.suppress(psutil.Error):
                process.kill()
        eventually(lambda: not marked(self.marker), within=10, what="end of the killed processes")

    @property
    def is_up(self) -> bool:
        try:
            return psutil.Process(self._server.pid()).status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, psutil.Error):
            return False


def wait_for_end(subject: Subject, limit_s: float = END_S) -> list[str]:
    """Waits until a subject's processes have gone; returns those that have not."""
    deadline = time.monotonic() + limit_s
    while (left := marked(subject.marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    names = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            names.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return names


def _mosec(variables: Mapping[str, str], batch_size: int) -> Server:
    return MosecServer(app=APPS / "mosec_app.py", models=("ledger",), variables=variables)


def _litserve(variables: Mapping[str, str], batch_size: int) -> Server:
    return LitServeServer(app=APPS / "litserve_app.py", models=("ledger",), variables=variables)


def _torchserve(variables: Mapping[str, str], batch_size: int) -> Server:
    torchserve.check_java()
    archive("ledger", APPS / "ledger_handler.py")
    # Models come and go in a soak.
    options = {"workers": 2, "environment": variables, "settings": {"enable_model_api": "true"}}
    return torchserve.server(batch_size=batch_size, models=("ledger",), **options)


#: They make a server, not yet started, from variables of its environment and the size of batches: mosec and LitServe
#: run without, which both do by default.
RIVALS: dict[str, Callable[[Mapping[str, str], int], Server]] = {
    "torchserve": _torchserve,
    "mosec": _mosec,
    "litserve": _litserve,
}


def subject(name: str, folder: Path, *, ms: int = 1, batch_size: int = 4) -> Subject:
    """A server by its name, not yet started.

    Args:
        name: "wsgi-ts" or one of `RIVALS`.
        folder: an empty one, for the ledger.
        ms: how long a batch takes.
        batch_size: of ours; the others make no batches, but for TorchServe.
    """
    if name == Ours.name:
        return Ours(folder, {"WSGI_TS_LEDGER_MS": str(ms)}, batch_size=batch_size)
    return Other(name, folder, ms, batch_size)
