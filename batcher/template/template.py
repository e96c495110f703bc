"""The loop of a worker template: a process of which model workers are forks.

It starts workers in milliseconds, kills and reaps them, and writes their output to the model's logs. One thread, one
selector; CUDA is never initialised here, since a fork of an initialised process cannot use it. `start` tells what is
imported in it, and why there are two.

What it tells of each life of a worker: `WorkerStarted`, `WorkerLoaded` at most once, `WorkerExited` last. A start that
fails is a `WorkerExited` with pid -1. The end of the channel ends the template, and the end of the template ends the
workers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import field

from wsgi_ts import messages
from wsgi_ts.batcher.shm.group_board import group_name
from wsgi_ts.batcher.shm.mailbox import mailbox_name
from wsgi_ts.batcher.spawn.exit import WORKER_VARIABLE, exit_fields, kill_descendants, kill_leftovers, worker_mark
from wsgi_ts.batcher.spawn.process import Entry, Spawned, spawn
from wsgi_ts.batcher.template.imports import import_numpy
from wsgi_ts.batcher.template.output import WorkerOutput
from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.control.codec import FROM_TEMPLATE, FROM_WORKER, TO_TEMPLATE, UnknownMessage
from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.metrics.reported import ModelMetrics
from wsgi_ts.process import exit_reason
from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: A worker sends one frame, a group one for each rank more; what comes beyond that at once is nonsense.
_MOST_STATUS_FRAMES = 256
#: How much of a dead worker's unread output is still read.
_FINAL_READS = 16
#: Metrics are handed over once in so many seconds; so many hand-overs that were not needed may be made up for, each so
#: many seconds after the one before.
_HAND_OVER_S = 0.2
_MOST_CREDIT = 20.0
_QUICK_HAND_OVER_S = 0.01


@dataclass(slots=True)
class _Life:
    """One running model worker."""

    order: messages.SpawnWorker
    process: Spawned
    output: WorkerOutput
    open_fds: set[int] = field(default_factory=set)

    @property
    def key(self) -> tuple[int, int]:
        """The worker's number, and which of its lives this is."""
        return self.order.worker_id, self.order.start_count

    def marks(self) -> tuple[bytes, ...]:
        """What only the processes of this life have in their environment or among their mappings."""
        order = self.order
        mailbox = mailbox_name(order.prefix, order.batcher_index, order.worker_id, order.start_count)
        mark = worker_mark(order.prefix, order.worker_id, order.start_count)
        mapped = [f"{name}{end}".encode() for name in (mailbox, group_name(mailbox)) for end in ("\n", " (deleted)")]
        return f"{WORKER_VARIABLE}={mark}\0".encode(), *mapped


class Template:
    """The loop of a worker template.

    Args:
        warm_pid: the warm template, where this process has forked one; each ends with the other.
    """

    def __init__(
        self,
        batcher: Channel,
        logs: LogFiles,
        metrics: ModelMetrics,
        entry: Entry,
        first: messages.FromTemplate,
        warm_pid: int | None = None,
    ) -> None:
        self._batcher = batcher
        self._logs = logs
        self._metrics = metrics
        self._next_hand_over = 0.0
        self._handed_over_at = -math.inf
        self._credit = 0.0
        self._entry = entry
        self._first = first
        self._warm_pid = warm_pid
        self._lives: dict[int, _Life] = {}
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._signals, self._signals_in = socket.socketpair()

    def run(self) -> None:
        """Serves until the batcher is gone or SIGTERM comes; then ends all workers."""
        self._listen_for_signals()
        self._watch(self._signals.fileno(), self._on_signals)
        self._watch(self._batcher.fileno(), self._on_batcher)
        try:
            self._tell(self._first)
            while not self._stopping:
                wait_s = max(0.0, self._next_hand_over - time.monotonic()) if self._metrics.has_updates else None
                for key, _ in self._selector.select(wait_s):
                    key.data()
                self._hand_over_metrics()
        except ChannelClosed:
            log.debug("The batcher is gone.")
        finally:
            kill_descendants()
            for life in self._lives.values():
                self._close(life)
            self._selector.close()

    def _listen_for_signals(self) -> None:
        """SIGCHLD and SIGTERM become bytes on a socket that the selector watches."""
        self._signals.setblocking(False)
        self._signals_in.setblocking(False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda _number, _frame: None)
            signal.siginterrupt(number, False)
        for ignored in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(ignored, signal.SIG_IGN)
        signal.set_wakeup_fd(self._signals_in.fileno(), warn_on_full_buffer=False)

    def _on_signals(self) -> None:
        numbers = self._signals.recv(4096)
        if signal.SIGTERM in numbers:
            self._stopping = True
        # Also when the byte of a SIGCHLD was lost among many others: any signal reaps.
        self._reap()

    def _hand_over_metrics(self) -> None:
        """Sends what workers have reported since the last time: at once, where not much was reported before.

        So a scrape that follows a request finds what its handler has recorded, and many requests cost little.
        """
        now = time.monotonic()
        if self._metrics.has_updates and now >= self._next_hand_over:
            since = now - self._handed_over_at
            self._credit = min(self._credit + since / _HAND_OVER_S, _MOST_CREDIT) - 1.0
            self._handed_over_at = now
            self._next_hand_over = now + (_QUICK_HAND_OVER_S if self._credit >= 1.0 else _HAND_OVER_S)
            self._tell(messages.MetricsReported(self._metrics.take_updates()))

    def _on_batcher(self) -> None:
        for message in self._batcher.receive_messages(TO_TEMPLATE, "the batcher"):
            match message:
                case messages.SpawnWorker():
                    self._start(message)
                case messages.KillWorker(worker_id, start_count):
                    self._kill(worker_id, start_count)
                case messages.ReopenLogs():
                    self._logs.reopen()

    def _tell(self, message: messages.FromTemplate) -> None:
        self._batcher.send(FROM_TEMPLATE.encode(message))

    def _start(self, order: messages.SpawnWorker) -> None:
        if order.spec.needs_numpy:
            import_numpy()
        try:
            process = spawn(order, self._entry)
        except OSError as error:
            text = f"Cannot start model worker {order.worker_id}: {error}"
            log.error(text)
            self._tell(messages.WorkerExited(order.worker_id, order.start_count, -1, None, None, [text]))
            return
        life = _Life(order, process, WorkerOutput(order.thread_name, self._logs, self._metrics, time.monotonic()))
        self._lives[process.pid] = life
        life.open_fds |= {process.stdout, process.stderr, process.status.fileno()}
        self._watch(process.stdout, lambda: self._on_output(life, process.stdout, "stdout"))
        self._watch(process.stderr, lambda: self._on_output(life, process.stderr, "stderr"))
        self._watch(process.status.fileno(), lambda: self._on_status(life))
        self._tell(messages.WorkerStarted(*life.key, process.pid))

    def _kill(self, worker_id: int, start_count: int) -> None:
        for pid, life in self._lives.items():
            if life.key == (worker_id, start_count):
                # The group does not exist yet in the first moments after the fork.
                os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    def _on_output(self, life: _Life, fd: int, stream: str) -> None:
        if fd in life.open_fds and not life.output.read(fd, stream, time.monotonic()):
            self._forget(life, fd)

    def _on_status(self, life: _Life) -> None:
        status = life.process.status
        fd = status.fileno()
        if fd not in life.open_fds:
            return
        try:
            frames = status.receive_ready()
        except (ChannelClosed, ValueError):
            self._forget(life, fd)
            return
        # The worker runs user code, which may write anything here: pass on what makes sense, once.
        for frame in frames[:_MOST_STATUS_FRAMES]:
            with contextlib.suppress(UnknownMessage):
                match FROM_WORKER.decode(frame):
                    case messages.WorkerProgress(text=str(text)) if life.order.spec.ranks:
                        self._tell(messages.WorkerProgress(*life.key, text))
                    case messages.WorkerLoaded(status=int(code), message=str(text), load_ms=int(load_ms)):
                        self._forget(life, fd)
                        self._tell(messages.WorkerLoaded(*life.key, code, text, load_ms))
                        return

    def _reap(self) -> None:
        """Sees to every child that has ended: workers, and orphans of their handlers."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            life = self._lives.get(ended.si_pid)
            if life is not None:
                # Before it is reaped: until then nobody else can get its pid.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(ended.si_pid, signal.SIGKILL)
                spare = self._lives.keys() | ({self._warm_pid} if self._warm_pid is not None else set())
                kill_leftovers(ended.si_pid, life.marks(), spare - {ended.si_pid})
            _, status = os.waitpid(ended.si_pid, 0)
            if life is not None:
                self._ended(life, status)
            elif ended.si_pid == self._warm_pid:
                log.error("The warm worker template ended: %s.", exit_reason(os.waitstatus_to_exitcode(status)))
                self._stopping = True

    def _ended(self, life: _Life, status: int) -> None:
        pid = life.process.pid
        del self._lives[pid]
        self._on_status(life)
        for fd, stream in ((life.process.stdout, "stdout"), (life.process.stderr, "stderr")):
            for _ in range(_FINAL_READS):
                if fd in life.open_fds and not life.output.read(fd, stream, time.monotonic()):
                    self._forget(life, fd)
        life.output.finish()
        self._close(life)
        code, signal_name = exit_fields(status)
        self._tell(messages.WorkerExited(*life.key, pid, code, signal_name, list(life.output.last_lines)))

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _forget(self, life: _Life, fd: int) -> None:
        life.open_fds.discard(fd)
        self._selector.unregister(fd)

    def _close(self, life: _Life) -> None:
        for fd in list(life.open_fds):
            self._forget(life, fd)
        os.close(life.process.stdout)
        os.close(life.process.stderr)
        life.process.status.close()
