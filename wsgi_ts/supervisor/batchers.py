"""The supervisor's batchers: started, heard, killed when they hang, and started again when they die."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import BatcherWord
from wsgi_ts.control.channel import ChannelClosed
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.messages import (
    FROM_BATCHER,
    BatcherStarted,
    FromBatcher,
    MetricsReported,
    ModelUnloaded,
    SegmentAttached,
    SegmentRetired,
    TemplateFailed,
    TemplateReady,
    ToBatcher,
    WorkerReport,
)
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.registry import Registry
from wsgi_ts.supervisor.batcher_process import BatcherLink
from wsgi_ts.supervisor.loop import MainLoop
from wsgi_ts.supervisor.metrics.keeper import MetricsKeeper
from wsgi_ts.supervisor.segments import SegmentKeeper

log = logging.getLogger(__name__)

#: How long the model workers of killed batchers are waited for, in seconds.
_WORKERS_LIMIT_S = 2.0
_WORKERS_LOOK_S = 0.05


class BatcherTier:
    """All batchers of an instance. All methods but `send` belong to the supervisor's main thread.

    Attributes:
        links: the batchers, by their index.
        segments: the segments that they attach.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        loop: MainLoop,
        directory: RunDirectory,
        board: Board,
        registry: Registry,
        manager: ModelManager,
        metrics: MetricsKeeper,
        publish: Callable[[], None],
        on_ready: Callable[[], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            devices: one batcher for each of these.
            loop: where they are watched and heard.
            directory: the run directory.
            board: the instance's board, for their heartbeats.
            registry: is told what they report of model workers.
            manager: knows what a restarted one has to be told.
            metrics: takes what they report of handlers' metrics.
            publish: makes the registry's state known to the data path.
            on_ready: called when one of them has something to say of itself.
            on_failure: told why one of them, or its worker template, that has never worked cannot be started.
        """
        self.links = [BatcherLink(index, device, directory.prefix) for index, device in enumerate(devices)]
        self.segments = SegmentKeeper(directory.prefix, loop.selector, self.links)
        self._selector = loop.selector
        self._directory = directory
        self._board = board
        self._registry = registry
        self._manager = manager
        self._metrics = metrics
        self._publish = publish
        self._on_ready = on_ready
        self._on_failure = on_failure

    def is_ready(self, *, warm: bool) -> bool:
        """Whether all have worked at least once; with `warm` also their worker templates."""
        return all(link.is_warm if warm else link.lives.has_worked for link in self.links)

    def send(self, batcher: int, message: ToBatcher) -> None:
        """Sends a message to one of them; dropped while that is being started again."""
        self.links[batcher].send(message)

    def send_all(self, message: ToBatcher) -> None:
        """Sends a message to every one."""
        for link in self.links:
            link.send(message)

    def start(self) -> None:
        """Starts them."""
        for link in self.links:
            self._start(link)

    def start_again(self, now: float) -> None:
        """Starts those again that have died and whose time has come."""
        for link in self.links:
            if link.child is None and link.workers_are_gone(now) and now >= link.restart_at:
                link.remove_mailboxes()
                try:
                    self._start(link)
                except (OSError, RuntimeError) as error:
                    log.error("%s cannot be started: %s", link.name, error)
                    link.postpone(now)
                else:
                    log.info("%s started again, life %d", link.name, link.epoch)

    def kill_hung(self) -> None:
        """Kills those whose heartbeat stands still; to be called once a second."""
        for link in self.links:
            heartbeat = self._board.words[self._board.batcher_row(link.index) + BatcherWord.HEARTBEAT_NS]
            if link.child is not None and link.is_hung(heartbeat):
                log.error("%s (pid %d) does not answer any more and is killed", link.name, link.child.pid)
                link.child.send_signal(signal.SIGKILL)

    def wait_for_workers(self) -> None:
        """Waits until the batchers' model workers are gone, once the batchers are; kills those that stay."""
        for link in self.links:
            deadline = time.monotonic() + _WORKERS_LIMIT_S
            while not link.workers_are_gone(time.monotonic()) and time.monotonic() < deadline:
                time.sleep(_WORKERS_LOOK_S)

    def _start(self, link: BatcherLink) -> None:
        # Under the registry's lock no operation sends anything between the start and what the start has to tell.
        with self._registry.changed:
            threads = len(os.sched_getaffinity(0))
            attachable = self.segments.table.attachable()
            child = link.start(self._directory.path, self._directory.log_plan_file, attachable, threads)
            for message in self._manager.replay(link.index):
                link.send(message)
        assert link.channel is not None
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_death(link))
        self._selector.register(link.channel, selectors.EVENT_READ, lambda: self._on_events(link))
        self._directory.add_child(child.identity, link.name)

    def _on_events(self, link: BatcherLink) -> None:
        assert link.channel is not None
        try:
            events = link.channel.receive_messages(FROM_BATCHER, link.name)
        except (ChannelClosed, ValueError) as error:
            # Its pidfd tells the rest. A batcher that closed its channel and lives on is of no use.
            self._selector.unregister(link.channel)
            if link.child is not None and not self._registry.draining:
                log.debug("%s closed its channel: %s", link.name, error)
                link.child.send_signal(signal.SIGKILL)
            return
        for event in events:
            self._take(link, event)

    def _take(self, link: BatcherLink, event: FromBatcher) -> None:
        match event:
            case BatcherStarted():
                link.came_up = True
                log.info("%s started", link.name)
            case TemplateReady(missing):
                self._template_is_ready(link, missing)
            case TemplateFailed():
                self._on_failure(link.lives.in_words("its worker template ended again and again before it had worked"))
            case SegmentAttached(index):
                # Only now: what it cannot do, it finds out with the first web worker's segment.
                link.lives.has_worked = True
                self._on_ready()
                self.segments.table.attached(index, link.index)
            case SegmentRetired(index):
                self.segments.table.retired(index, link.index)
            case WorkerReport():
                with self._registry.changed:
                    if self._registry.apply_report(link.index, event):
                        self._publish()
                        self._metrics.worker_changed()
            case MetricsReported(updates):
                self._metrics.take_updates(updates)
            case ModelUnloaded(model_index):
                self._manager.model_unloaded(link.index, model_index)

    def _template_is_ready(self, link: BatcherLink, missing: dict[str, str]) -> None:
        """A module that cannot be imported stops the start; later it is one that was there and is not any more."""
        if missing and not link.is_warm:
            name, reason = next(iter(missing.items()))
            self._on_failure(
                f"preload_modules: {name} cannot be imported ({reason}); correct the name, install it for "
                f"{sys.executable}, or take it out of the key"
            )
        link.is_warm = True
        self._on_ready()

    def _on_death(self, link: BatcherLink) -> None:
        assert link.child is not None
        assert link.channel is not None
        pid = link.child.pid
        self._selector.unregister(link.child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(link.channel)
        with self._registry.changed:
            reason = link.died(time.monotonic())
            self._registry.batcher_lost(link.index)
        self._directory.remove_child(pid)
        self.segments.table.batcher_lost(link.index)
        if self._registry.draining:
            return
        failure = link.lives.ended(reason)
        if failure is not None:
            link.restart_at = float("inf")
            self._on_failure(failure)
        else:
            log.error("%s (pid %d) has ended (%s) and is started again", link.name, pid, reason)
            self._publish()
