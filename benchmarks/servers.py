"""A server under test, whichever it is: start, ask, look at, stop.

What all of them share is here. `archive_server` has wsgi-ts and TorchServe, which take the same commands, configuration
and archives; each of the others has a module in `rivals`. Each server has its own working folder, log and free ports.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
from workloads import BODIES, CONTENT_TYPES

BENCHMARKS = Path(__file__).resolve().parent
PROJECT = BENCHMARKS.parent
WORK = BENCHMARKS / ".work"

LARGEST_BODY_BYTES = 20_000_000
START_LIMIT_S = 180.0
STOP_LIMIT_S = 90.0


_Server = TypeVar("_Server", bound="Server")


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text says what to do."""


class Server(ABC):
    """A server, running while the context is open.

    Args:
        name: of the program, as the tables have it.
        folder: a name for its working folder; two servers that run at the same time have different ones.
        models: those it serves; the first one is waited for first.

    Attributes:
        inference: the address that predictions are sent to, such as http://127.0.0.1:8080.
        grpc: the address of its gRPC inference API, where it has TorchServe's.
        first_answer_s: seconds from the start to the first model's first answer.
    """

    stop_limit_s = 30.0

    def __init__(self, name: str, *, folder: str, models: Sequence[str]) -> None:
        self.name = name
        self.folder = WORK / f"run-{folder}"
        self.models = models
        self.inference = f"http://127.0.0.1:{free_ports(1)[0]}"
        self.grpc = ""
        self.first_answer_s = 0.0

    def __enter__(self: _Server) -> _Server:
        """Starts the server and waits until each model has answered.

        Raises:
            BenchmarkError: it ended, or was not ready in time.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "tmp").mkdir(parents=True)
        started = time.monotonic()
        try:
            self.launch()
            for model in self.models:
                self._wait_for_answer(model, started)
                self.first_answer_s = self.first_answer_s or time.monotonic() - started
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the server and waits until all its processes have gone."""
        self.stop()

    @abstractmethod
    def launch(self) -> None:
        """Starts it, without waiting for an answer."""

    @abstractmethod
    def pid(self) -> int:
        """The process that all others descend from; raises OSError or ValueError where there is none."""

    @abstractmethod
    def ask_to_stop(self) -> None:
        """Asks it to end, without waiting."""

    @abstractmethod
    def path(self, model: str) -> str:
        """Where predictions of a model are asked for."""

    def headers(self, model: str) -> dict[str, str]:
        """Those that a prediction of a model needs."""
        return {"Content-Type": CONTENT_TYPES.get(model, "application/octet-stream")}

    def encode(self, model: str, body: bytes) -> bytes:
        """A body in the form that the server wants; `workloads` says what the models take."""
        return body

    def decode(self, model: str, answer: bytes) -> bytes:
        """What the model said, out of the server's answer."""
        return answer

    def predict(self, model: str, body: bytes, path: str = "") -> bytes:
        """One prediction, of what answers like the model where a path is given.

        Raises:
            OSError: the answer is not a 200 (urllib's errors are OSErrors).
        """
        url = f"{self.inference}{path or self.path(model)}"
        return self.decode(model, http_request("POST", url, self.encode(model, body), self.headers(model)))

    def processes(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        top = psutil.Process(self.pid())
        return [top, *top.children(recursive=True)]

    def stop(self) -> None:
        """Stops the server; what has not gone after `stop_limit_s` seconds is killed."""
        try:
            processes = self.processes()
        except (OSError, ValueError, psutil.Error):
            processes = []
        self.ask_to_stop()
        _, alive = psutil.wait_procs(processes, timeout=self.stop_limit_s)
        for process in alive:
            process.kill()

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self.folder / "server.log"

    def last_lines(self) -> str:
        """The end of what it has printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def _wait_for_answer(self, model: str, started: float) -> None:
        while True:
            try:
                self.predict(model, BODIES[model])
                return
            except OSError as error:
                if not self._runs():
                    raise BenchmarkError(
                        f"{self.name} has ended while it was starting:\n{self.last_lines()}"
                    ) from error
                if time.monotonic() - started > START_LIMIT_S:
                    raise BenchmarkError(
                        f"{self.name} gave no answer from {model} within {START_LIMIT_S:.0f} s ({error}):\n"
                        f"{self.last_lines()}"
                    ) from error
                time.sleep(0.01)

    def _runs(self) -> bool:
        try:
            return psutil.Process(self.pid()).status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, psutil.Error):
            return False


class CommandServer(Server):
    """A server that is one command in the foreground, ended by SIGTERM to its process group."""

    #: Some wait for requests whose clients have long gone.
    stop_limit_s = 5.0
    _process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """The command, and what it needs in its environment."""

    def launch(self) -> None:
        """Starts the command."""
        words, variables = self.command()
        environment = {**os.environ, "TMPDIR": str(self.folder / "tmp"), **variables}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                words, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def pid(self) -> int:
        """The command's process."""
        if self._process is None:
            raise ValueError(f"{self.name} has not been started")
        return self._process.pid

    def ask_to_stop(self) -> None:
        """Sends SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    @property
    def port(self) -> int:
        """Of the inference address."""
        return int(self.inference.rpartition(":")[2])


@dataclass(frozen=True)
class Rival:
    """A server with the settings that it may like best.

    Attributes:
        name: of the program; its versions are in rivals/NAME.txt.
        configurations: what to call each, and what makes the server, not yet started.
    """

    name: str
    configurations: Mapping[str, Callable[[], Server]]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def http_request(
    method: str,
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    limit_s: float = 120.0,
) -> bytes:
    """The body of the answer; raises OSError (urllib's errors are) where it is not a 200."""
    request = urllib.request.Request(url, data=body, method=method, headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=limit_s) as answer:
        content: bytes = answer.read()
        return content


def environment(name: str, requirements: Path) -> Path:
    """A virtual environment in benchmarks/.work, made anew only when its requirements have changed.

    Args:
        name: of its folder.
        requirements: file with the version of every package.

    Returns:
        The folder of its commands.
    """
    folder = WORK / name
    stamp = folder / ".installed"
    wanted = requirements.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"==> installing {name} into benchmarks/.work/{name} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip: list[Any] = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--requirement", requirements]
        subprocess.run([str(word) for word in pip], check=True)
        stamp.write_text(wanted)
    return folder / "bin"
