"""Our server as an engine inside another one: no addresses, requests come from the process that has started it.

Supervisor, batchers and model workers are those of any instance. This process is a client of it with a segment of its
own, as a web worker or the gRPC server is. The instance ends with this process, however that ends: its guard looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsgi_ts.control.client import ControlPlane, NotReachable
from wsgi_ts.dataplane.async_call import Call
from wsgi_ts.dataplane.async_plane import AsyncPlane
from wsgi_ts.dataplane.routes import RoutingTable, Target
from wsgi_ts.errors import ServerError, ServiceUnavailable
from wsgi_ts.instance.instance import Instance
from wsgi_ts.instance.record import Record
from wsgi_ts.integrations.home import Home
from wsgi_ts.logs.setup import no_log_files
from wsgi_ts.process import inherited_environ, is_readable, python_command, wait_until_gone
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.metrics.load import METRICS as LOAD_METRICS

log = logging.getLogger(__name__)

#: How long the instance may take until it answers, in seconds; models take their time beyond that.
START_LIMIT_S = 60.0
#: How long an answer about its state may take, in seconds.
STATE_LIMIT_S = 10.0
#: What it gets to end on top of `graceful_timeout`, in seconds.
_STOP_MARGIN_S = 10.0
_LOOK_S = 0.02
_SETTINGS = "config.properties"
_KEPT_LINES = 20


class EngineError(Exception):
    """The engine cannot be started, or has ended; the message says why."""


class Engine:
    """One instance that belongs to this process. It runs when it has been made; `stop` it in any case.

    Args:
        settings: keys of config.properties. Those about addresses, tokens and threads of HTTP have no meaning.
        log_dir: where its log files go.

    Attributes:
        run_dir: its run directory, by which `wsgi-ts status` finds it.

    Raises:
        EngineError: it cannot be started.
    """

    def __init__(self, settings: Mapping[str, object], log_dir: Path) -> None:
        self._home = Home.make()
        self.run_dir = self._home.path
        self._store = RunFiles(self.run_dir).models
        self._plane: AsyncPlane | None = None
        self._ended = ""
        self._is_stopped = False
        self._stopping = threading.Lock()
        self._control = ControlPlane(self.run_dir)
        try:
            self._output = self._launch(settings, log_dir)
            self._guard, self._supervisor = self._wait_until_it_answers()
            self._config = Config.from_json(RunFiles(self.run_dir).config.read_text())
        except BaseException:
            self._end_by_force()
            raise

    def _launch(self, settings: Mapping[str, object], log_dir: Path) -> _Output:
        # Where archives are unpacked is a place for links to them, too: it is removed with the instance.
        self._store.mkdir()
        values = {"model_store": self._store, "web_workers": 1, "metrics_mode": "prometheus", **settings}
        file = self.run_dir / _SETTINGS
        file.write_text("".join(f"{key}={_escaped(value)}\n" for key, value in values.items()))
        log_dir.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in inherited_environ().items() if name != "TS_CONFIG_FILE"}
        environment |= {"LOG_LOCATION": os.fspath(log_dir), "METRICS_LOCATION": os.fspath(log_dir)}
        command = python_command("wsgi_ts.cli.embedded", "--owner", str(os.getpid()))
        command += ["--ts-config", os.fspath(file), "--run-dir", os.fspath(self.run_dir)]
        ours, theirs = os.pipe()
        output = _Output(ours)
        try:
            launcher = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=theirs,
                env=environment,
                check=False,
            )
        finally:
            os.close(theirs)
            file.unlink()
        if launcher.returncode:
            raise self._not_started(output)
        return output

    def _wait_until_it_answers(self) -> tuple[int, int]:
        """Returns pidfds of its guard and its supervisor."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                status = self._control.call("status", timeout_s=STATE_LIMIT_S)
                pids = {row["role"]: row["pid"] for row in status["processes"]}
                return os.pidfd_open(pids["guard"]), os.pidfd_open(pids["supervisor"])
            except (NotReachable, ProcessLookupError):
                if self._output.has_ended:
                    raise self._not_started(self._output) from None
            if time.monotonic() > deadline:
                raise EngineError(f"The engine did not answer within {START_LIMIT_S:g} s")
            time.sleep(_LOOK_S)

    def _not_started(self, output: _Output) -> EngineError:
        # Of the settings it says where they stand in a file that nobody knows.
        words = re.sub(rf"{re.escape(os.fspath(self.run_dir))}/{_SETTINGS}:\d+: ", "", output.last_words())
        return EngineError(f"The engine cannot be started: {words}")

    def register(self, archive: str, **arguments: Any) -> str:
        """Loads a model, waits for its workers and returns its name.

        Args:
            archive: a model archive, or a folder with what is in one, or an address where one can be fetched.
            **arguments: those of the register call: `initial_workers`, `batch_size`, …

        Raises:
            EngineError: there is no such archive.
            ServerError: it cannot be loaded, or this version of the model is registered already.
        """
        if "://" in archive:
            url = archive
        else:
            path = Path(archive).expanduser().absolute()
            if not path.exists():
                raise EngineError(f"{path}: there is no such file or folder on this machine")
            url = path.name
            link = self._store / url
            link.unlink(missing_ok=True)
            link.symlink_to(path)
        return str(self._control.call("register_model", url=url, synchronous=True, **arguments)["name"])

    def attach(self) -> None:
        """Makes the segment through which this process sends requests. Call it on the event loop that sends them.

        Raises:
            ServerError, OSError: it cannot be made.
        """
        loop = asyncio.get_running_loop()
        files = RunFiles(self.run_dir)
        record = Record.read(files.path)
        if record is None or record.prefix is None:
            raise EngineError(self.state() or "The engine has no record of itself")
        self._plane = AsyncPlane(Instance(self._config, files.path, record.prefix, no_log_files()), loop)
        loop.add_reader(self._supervisor, self._on_end, loop)

    @property
    def routes(self) -> RoutingTable:
        """Which models there are now."""
        return self._attached.routes

    @property
    def under_way(self) -> int:
        """How many requests of this process are under way."""
        return self._attached.under_way

    def submit(self, target: Target, head: bytes, parts: Sequence[bytes], content_type: bytes = b"") -> Call:
        """Submits a request: see `AsyncPlane.submit`.

        Raises:
            ServerError: it is refused.
        """
        if self._ended or self._is_stopped:
            raise ServiceUnavailable(self._ended or "The engine is stopped.")
        plane = self._attached
        return plane.submit(target, head, parts, content_type, plane.begin_trace(target, head, ()))

    @property
    def _attached(self) -> AsyncPlane:
        assert self._plane is not None, "attach comes first"
        return self._plane

    def state(self) -> str:
        """Returns why it cannot work; empty where it can. Asks the supervisor: call it on a thread of its own."""
        if self._ended:
            return self._ended
        try:
            status = self._control.call("status", timeout_s=STATE_LIMIT_S)
        except ServerError as error:
            return f"The engine's supervisor: {error.message}"
        if status["draining"]:
            return "The engine is stopping"
        return ""

    def load(self, model: str) -> dict[str, float]:
        """Returns the gauges of a model by which servers are scaled, under the names that /metrics has.

        Asks the supervisor: call it on a thread of its own.

        Raises:
            ServerError: the supervisor cannot be asked.
        """
        text = self._control.call("metrics", names=sorted(LOAD_METRICS), timeout_s=STATE_LIMIT_S)
        found = re.findall(r'^(\w+)\{model_name="([^"]*)",.*\} (\S+)$', text, re.MULTILINE)
        return {name: float(value) for name, of, value in found if of == model}

    def stop(self) -> None:
        """Ends it and waits for that: its models' requests end first. Nothing is left; a second call does nothing."""
        with self._stopping:
            if self._is_stopped:
                return
            self._is_stopped = True
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                signal.pidfd_send_signal(self._guard, signal.SIGTERM)
            if not is_readable(self._guard, self._config.graceful_timeout + _STOP_MARGIN_S):
                log.warning("The engine did not stop in time and is killed")
            self._end_by_force()
            os.close(self._guard)
            if self._plane is None:
                os.close(self._supervisor)

    def _end_by_force(self) -> None:
        """Kills what still runs, and removes what is left."""
        self._is_stopped = True
        self._control.close()
        record = Record.find(self.run_dir)
        if record is not None:
            running = [each for each in (record.owner, *record.children) if each is not None]
            for each in running:
                each.kill()
            wait_until_gone(running, _STOP_MARGIN_S)
        self._home.remove()

    def _on_end(self, loop: asyncio.AbstractEventLoop) -> None:
        """The supervisor has ended, and with it all that could answer."""
        loop.remove_reader(self._supervisor)
        os.close(self._supervisor)
        if not self._is_stopped:
            self._ended = "The engine has ended: its supervisor was killed or has failed"
            log.error("%s; its last words so far: %s", self._ended, self._output.last_words(0))
        self._attached.give_up(ServiceUnavailable(self._ended or "The engine is stopped."))


class _Output:
    """What the instance writes to its standard error, which is little: its log says more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._thread = threading.Thread(target=self._read, name="engine's stderr", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether all processes that could write have ended."""
        return not self._thread.is_alive()

    def last_words(self, limit_s: float = 1.0) -> str:
        """Returns the last line; waits at most `limit_s` seconds until no more come."""
        self._thread.join(limit_s)
        return self._lines[-1] if self._lines else "it said nothing"

    def _read(self) -> None:
        with open(self._fd, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if text := line.strip():
                    self._lines.append(text)
                    log.info("engine: %s", text)


def _escaped(value: object) -> str:
    """A value as it stands in config.properties, where a backslash begins an escape."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("\\", "\\\\").replace("\n", "\\n")
