"""The supervisor's side of one batcher: its process, its channel, and what its last life has left."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Iterable
from typing import Any

from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.control.codec import TO_BATCHER
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.messages import ToBatcher
from wsgi_ts.process import processes_mapping, python_command
from wsgi_ts.supervisor.child import SupervisedProcess

log = logging.getLogger(__name__)

#: How long the model workers of a dead batcher may take to be gone by themselves, in seconds.
ORPHAN_LIMIT_S = 1.0


class BatcherProcess(SupervisedProcess):
    """The batcher of a device (`cpu`, `cuda:N`), through all its lives.

    All methods but `send` belong to the supervisor's main thread.

    Attributes:
        index: its number, also on the board.
        channel: to its present life; None between two lives.
        segments: the segments that this life was told to attach.
        is_warm: its worker template was ready at least once.
    """

    hung_looks = 5

    def __init__(self, index: int, device: str, directory: RunDirectory) -> None:
        super().__init__(f"batcher {index} ({device})", directory)
        self.index = index
        self.channel: Channel | None = None
        self.segments: set[int] = set()
        self.is_warm = False
        self._device = device
        self._workers_prefix = f"{directory.prefix}-b{index}-w"
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._died_at = 0.0
        self._heartbeat = 0

    @property
    def inbox(self) -> Channel:
        """Its channel."""
        assert self.channel is not None
        return self.channel

    def start(self, segments: Iterable[int], threads: int) -> None:
        """Starts the next life, which attaches these segments at once.

        Its model workers may use so many CPU cores, `threads`, in all.

        Raises:
            OSError, RuntimeError: no process or no thread can be started; nothing has changed.
        """
        attached = set(segments)
        outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        writer = threading.Thread(target=_write, args=(channel, outbox), name=f"to batcher {self.index}", daemon=True)
        with theirs:
            arguments = {
                "--index": self.index,
                "--device": self._device,
                "--prefix": self._directory.prefix,
                "--control-fd": theirs.fileno(),
                "--run-dir": self._directory.path,
                "--segments": ",".join(map(str, sorted(attached))),
                "--threads-budget": threads,
            }
            words = [str(word) for pair in arguments.items() for word in pair]
            try:
                writer.start()
                self._run(python_command("wsgi_ts.batcher", *words), [theirs.fileno()])
            except BaseException:
                outbox.put(None)
                channel.close()
                raise
        self.segments = attached
        self.channel = channel
        self._outbox = outbox

    def send(self, message: ToBatcher) -> None:
        """Sends a message, in the order of the calls; never blocks. Dropped while no process is there."""
        if self.child is not None:
            self._outbox.put(TO_BATCHER.encode(message))

    def died(self, now: float) -> str:
        """Takes note of the death of its process, at the monotonic time `now`; returns the reason."""
        channel = self.inbox
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            channel.sock.shutdown(socket.SHUT_RDWR)
        channel.close()
        self.channel = None
        self.segments = set()
        self._died_at = now
        return super().died(now)

    def workers_are_gone(self, now: float) -> bool:
        """Tells whether its last life has left no model worker; kills those that stay too long."""
        left = list(processes_mapping(self._workers_prefix))
        if left and now - self._died_at >= ORPHAN_LIMIT_S:
            for process in left:
                log.warning("Killing process %d, which its %s has left behind", process.pid, self.name)
                process.kill()
        return not left

    def remove_mailboxes(self) -> None:
        """Removes the mailboxes of the model workers of its last life."""
        unlink_prefix(self._workers_prefix)

    def take_heartbeat(self, heartbeat: int) -> None:
        """Notes its heartbeat as it stands on the board (0: none yet); one that has moved is a sign of life."""
        if heartbeat != self._heartbeat or heartbeat == 0:
            self._heartbeat, self._silent_looks = heartbeat, 0


def _write(channel: Channel, outbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Body of a channel's writing thread: a batcher that does not read holds up this thread and nobody else."""
    while (message := outbox.get()) is not None:
        try:
            channel.send(message)
        except (ChannelClosed, ValueError) as error:
            log.debug("A batcher's channel is closed: %s", error)
            return
