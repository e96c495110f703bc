"""The supervisor's batchers: started, heard, killed when they hang, and started again when they die."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence

from wsgi_ts import messages
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import BatcherWord
from wsgi_ts.cgroup import usable_cores
from wsgi_ts.control.channel import ChannelClosed
from wsgi_ts.control.codec import FROM_BATCHER
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.supervisor.batcher_process import BatcherProcess
from wsgi_ts.supervisor.child import Owner, ProcessGroup
from wsgi_ts.supervisor.metrics.collector import MetricsCollector
from wsgi_ts.supervisor.segments import Segments
from wsgi_ts.supervisor.worker_events import WorkerEvents

log = logging.getLogger(__name__)

#: How long the model workers of killed batchers are waited for, in seconds.
_WORKERS_LIMIT_S = 2.0
_WORKERS_LOOK_S = 0.05


class Batchers(ProcessGroup[BatcherProcess]):
    """All batchers of an instance, one for each device. All methods but `send` belong to the supervisor's main thread.

    Args:
        board: has their heartbeats.
        manager: knows what a restarted one has to be told.
        metrics: takes what they report of handlers' metrics.
        events: takes what they report of workers.
        publish: makes the registry's state known to the data path.

    Attributes:
        segments: the segments that they attach.
    """

    def __init__(
        self,
        devices: Sequence[str],
        owner: Owner,
        *,
        board: Board,
        manager: ModelManager,
        metrics: MetricsCollector,
        events: WorkerEvents,
        publish: Callable[[], None],
    ) -> None:
        super().__init__([BatcherProcess(n, device, owner.directory) for n, device in enumerate(devices)], owner)
        self.segments = Segments(board, owner.loop.selector, self.processes)
        self._board = board
        self._manager = manager
        self._metrics = metrics
        self._events = events
        self._publish = publish

    def is_ready(self, *, warm: bool) -> bool:
        """Tells whether all have worked at least once; with `warm` also their worker templates."""
        return all(each.is_warm if warm else each.has_worked for each in self.processes)

    def send(self, batcher: int, message: messages.ToBatcher) -> None:
        """Sends a message to one of them; dropped while that is being started again."""
        self.processes[batcher].send(message)

    def send_all(self, message: messages.ToBatcher) -> None:
        """Sends a message to every one."""
        for batcher in self.processes:
            batcher.send(message)

    def kill_hung(self) -> None:
        """Kills those whose heartbeat stands still; to be called once a second."""
        for batcher in self.processes:
            batcher.take_heartbeat(self._board.words[self._board.batcher_row(batcher.index) + BatcherWord.HEARTBEAT_NS])
        super().kill_hung()

    def wait_for_workers(self) -> None:
        """Waits until the batchers' model workers are gone, once the batchers are; kills those that stay."""
        for batcher in self.processes:
            deadline = time.monotonic() + _WORKERS_LIMIT_S
            while not batcher.workers_are_gone(time.monotonic()) and time.monotonic() < deadline:
                time.sleep(_WORKERS_LOOK_S)

    def _may_start(self, process: BatcherProcess, now: float) -> bool:
        return process.workers_are_gone(now)

    def _start(self, process: BatcherProcess) -> None:
        process.remove_mailboxes()
        # Under the registry's lock no operation sends anything between the start and what the start has to tell.
        with self._owner.registry.changed:
            process.start(self.segments.table.attachable(), usable_cores())
            for message in self._manager.workers.replay(process.index):
                process.send(message)

    def _hear(self, process: BatcherProcess) -> bool:
        try:
            events = process.inbox.receive_messages(FROM_BATCHER, process.name)
        except (ChannelClosed, ValueError) as error:
            # Its pidfd tells the rest. A batcher that closed its channel and lives on is of no use.
            if process.child is not None and not self._owner.registry.draining:
                log.debug("%s closed its channel: %s", process.name, error)
                process.child.send_signal(signal.SIGKILL)
            return False
        for event in events:
            self._take(process, event)
        return True

    def _bury(self, process: BatcherProcess) -> str:
        with self._owner.registry.changed:
            reason = super()._bury(process)
            self._owner.registry.batcher_lost(process.index)
        self.segments.table.batcher_lost(process.index)
        if not self._owner.registry.draining:
            self._publish()
        return reason

    def _take(self, batcher: BatcherProcess, event: messages.FromBatcher) -> None:
        match event:
            case messages.BatcherStarted():
                batcher.came_up = True
                log.info("%s started", batcher.name)
            case messages.TemplateReady(missing):
                self._template_is_ready(batcher, missing)
            case messages.TemplateFailed():
                # One that was ready under an earlier life of the batcher is started for ever, too.
                if not batcher.is_warm:
                    reason = "its worker template ended again and again before it had worked"
                    self._owner.on_failure(batcher.failure(reason))
            case messages.SegmentAttached(index):
                # Only now: what it cannot do, it finds out with the first web worker's segment.
                batcher.has_worked = True
                self._owner.on_ready()
                self.segments.table.attached(index, batcher.index)
            case messages.SegmentRetired(index):
                self.segments.table.retired(index, batcher.index)
            case messages.WorkerReport():
                self._events.reported(event)
                with self._owner.registry.changed:
                    if self._owner.registry.apply_report(batcher.index, event):
                        self._publish()
                        self._metrics.worker_changed()
            case messages.MetricsReported(updates):
                self._metrics.take_updates(updates)
            case messages.ModelUnloaded(model_index):
                self._manager.workers.has_unloaded(batcher.index, model_index)

    def _template_is_ready(self, batcher: BatcherProcess, missing: dict[str, str]) -> None:
        """A module that cannot be imported stops the start; later it is one that was there and is not any more."""
        if missing and not batcher.is_warm:
            name, reason = next(iter(missing.items()))
            self._owner.on_failure(
                f"preload_modules: {name} cannot be imported ({reason}); correct the name, install it for "
                f"{sys.executable}, or take it out of the key"
            )
        batcher.is_warm = True
        self._owner.on_ready()
