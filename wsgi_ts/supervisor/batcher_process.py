"""The supervisor's side of one batcher: its process, its channel, and its lives (epochs)."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.messages import TO_BATCHER, ToBatcher
from wsgi_ts.process import (
    INSTANCE_VARIABLE,
    Child,
    ProcessIdentity,
    processes_mapping,
    python_command,
)
from wsgi_ts.restart_backoff import RestartBackoff
from wsgi_ts.supervisor.child_output import FirstLives

log = logging.getLogger(__name__)

#: How long the model workers of a dead batcher may take to be gone by themselves, in seconds.
ORPHAN_LIMIT_S = 1.0
#: A batcher whose heartbeat stands still for so many looks (one a second) is killed.
HUNG_LOOKS = 5


class BatcherLink:
    """One batcher, through all its lives. All methods but `send` belong to the supervisor's main thread.

    Attributes:
        index: its number, also on the board.
        device: `cpu` or `cuda:N`.
        epoch: the number of its present life, from 1.
        child: its process; None between two lives.
        segments: the segments that this life was told to attach.
        restart_at: monotonic time of the next start; infinity while it runs.
        lives: tells whether it has worked at least once.
        is_warm: its worker template was ready at least once.
        came_up: this life has said that it serves.
    """

    def __init__(self, index: int, device: str, prefix: str) -> None:
        """Starts nothing yet."""
        self.index = index
        self.device = device
        self.epoch = 0
        self.child: Child | None = None
        self.channel: Channel | None = None
        self.segments: set[int] = set()
        self.restart_at = float("inf")
        self.lives = FirstLives(self.name)
        self.is_warm = False
        self.came_up = False
        self._prefix = prefix
        self._backoff = RestartBackoff()
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._died_at = 0.0
        self._heartbeat = 0
        self._still_looks = 0

    @property
    def name(self) -> str:
        """For people."""
        return f"batcher {self.index} ({self.device})"

    def start(self, run_dir: Path, log_plan: Path, segments: Iterable[int], threads: int) -> Child:
        """Starts the next life.

        Args:
            run_dir: the run directory.
            log_plan: file with the `LogPlan`.
            segments: the segments to attach at once.
            threads: CPU cores that its model workers may use in all.

        Raises:
            OSError, RuntimeError: no process or no thread can be started; nothing has changed but the epoch.
        """
        self.epoch += 1
        attached = set(segments)
        outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        writer = threading.Thread(target=_write, args=(channel, outbox), name=f"to batcher {self.index}", daemon=True)
        with theirs:
            arguments = {
                "--index": self.index,
                "--device": self.device,
                "--prefix": self._prefix,
                "--control-fd": theirs.fileno(),
                "--run-dir": run_dir,
                "--log-plan": log_plan,
                "--segments": ",".join(map(str, sorted(attached))),
                "--threads-budget": threads,
            }
            words = [str(word) for pair in arguments.items() for word in pair]
            try:
                writer.start()
                relay = self.lives.relay()
                try:
                    self.child = Child(
                        self.name,
                        python_command("wsgi_ts.batcher", *words),
                        pass_fds=[theirs.fileno(), *(relay.server_fds if relay else ())],
                        environ={INSTANCE_VARIABLE: self._prefix, **(relay.environ if relay else {})},
                        stderr=relay.fd if relay else None,
                    )
                finally:
                    if relay:
                        relay.close()
            except BaseException:
                outbox.put(None)
                channel.close()
                raise
        self.restart_at = float("inf")
        self.segments = attached
        self.channel = channel
        self._outbox = outbox
        self._still_looks = 0
        return self.child

    def postpone(self, now: float) -> None:
        """Its next life could not be started at the monotonic time `now`: sets the time of the next try."""
        self.restart_at = now + self._backoff.on_death(now)

    def send(self, message: ToBatcher) -> None:
        """Sends a message, in the order of the calls; never blocks. Dropped while no process is there."""
        if self.child is not None:
            self._outbox.put(TO_BATCHER.encode(message))

    def died(self, now: float) -> str:
        """Takes note of the death of its process, at the monotonic time `now`; returns the reason."""
        assert self.child is not None
        assert self.channel is not None
        reason = self.child.poll() or "running"
        self.child.close()
        self.child = None
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            self.channel.sock.shutdown(socket.SHUT_RDWR)
        self.channel.close()
        self.channel = None
        self.segments = set()
        self._died_at = now
        delay = self._backoff.on_death(now, came_up=self.came_up)
        self.restart_at = now + delay
        self.came_up = False
        if self._backoff.is_looping:
            log.error("%s dies again and again before it is up; the next start is in %g s", self.name, delay)
        return reason

    def workers_are_gone(self, now: float) -> bool:
        """Whether its last life has left no model worker; those that stay too long are killed."""
        left: list[ProcessIdentity] = list(processes_mapping(f"{self._prefix}-b{self.index}-w"))
        if left and now - self._died_at >= ORPHAN_LIMIT_S:
            for process in left:
                log.warning("Killing process %d, which its %s has left behind", process.pid, self.name)
                process.kill()
        return not left

    def remove_mailboxes(self) -> None:
        """Removes the mailboxes of the model workers of its last life."""
        unlink_prefix(f"{self._prefix}-b{self.index}-w")

    def is_hung(self, heartbeat: int) -> bool:
        """Looks at its heartbeat, once a second; True when that has stood still for too long.

        Looks are counted, and no time measured: a supervisor that was itself stopped for a while kills nobody.
        """
        if heartbeat in (0, self._heartbeat):
            self._still_looks += heartbeat != 0
        else:
            self._heartbeat, self._still_looks = heartbeat, 0
        return self._still_looks >= HUNG_LOOKS

    def describe(self) -> dict[str, Any]:
        """One line of `wsgi-ts status`."""
        return {
            "role": self.name,
            "pid": self.child.pid if self.child is not None else None,
            "state": "running" if self.child is not None else "restarting",
            "starts": self.epoch,
        }


def _write(channel: Channel, outbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Body of a link's writing thread: a batcher that does not read holds up this thread and nobody else."""
    while (message := outbox.get()) is not None:
        try:
            channel.send(message)
        except (ChannelClosed, ValueError) as error:
            log.debug("A batcher's channel is closed: %s", error)
            return
