"""The supervisor's dealings with segments: numbers for web workers, attaching, and removal after a death.

Belongs to the supervisor's main thread. It knows names and owners, and never looks into a segment.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Callable, Sequence
from typing import Any

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import WebWord
from wsgi_ts.batcher.shm.segment import segment_name
from wsgi_ts.batcher.shm.shared_memory import unlink
from wsgi_ts.errors import BadRequest
from wsgi_ts.messages import AttachSegment, RetireSegment
from wsgi_ts.supervisor.batcher_process import BatcherProcess
from wsgi_ts.supervisor.segment_table import SegmentEntry, SegmentTable


class Segments:
    """All segments of an instance, from the request for a number until the name is gone.

    Deaths of owners are noticed by the main thread's `selector`; `table` tells who owns what, and who still has to say
    something.
    """

    def __init__(self, board: Board, selector: selectors.BaseSelector, batchers: Sequence[BatcherProcess]) -> None:
        self.table = SegmentTable()
        self._board = board
        self._prefix = board.prefix
        self._selector = selector
        self._batchers = batchers

    def new(self, pid: int) -> dict[str, int]:
        """A number for a segment that process `pid` is about to make, and how many rings it needs.

        A process that asks again before it has made one gets the same number: /dev/shm was full the first time.

        Raises:
            BadRequest: there is no such process.
        """
        unused = self.table.unused(pid)
        if unused is not None:
            self._unlink(unused)
            return {"index": unused.index, "batchers": len(self._batchers)}
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise BadRequest(f"No process {pid}") from error
        entry = self.table.new(pid)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_owner_death(entry, pidfd))
        return {"index": entry.index, "batchers": len(self._batchers)}

    def ready(self, index: int, pid: int, done: Callable[[], None]) -> None:
        """The owner has made a segment: has all running batchers attach it, and then calls `done`.

        Raises:
            BadRequest: the segment is not that process's.
        """
        entry = self.table.get(index)
        if entry is None or entry.pid != pid:
            raise BadRequest(f"No segment {index} of process {pid}")
        running = [each for each in self._batchers if each.child is not None]
        self.table.await_attach(entry, [each.index for each in running], done)
        for batcher in running:
            batcher.segments.add(index)
            batcher.send(AttachSegment(index))

    def describe(self) -> list[dict[str, Any]]:
        """The lines of `wsgi-ts status`."""
        entries = self.table.all()
        return [{"segment": each.index, "web_worker": each.pid, "retired": each.is_retired} for each in entries]

    def _on_owner_death(self, entry: SegmentEntry, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        row = self._board.web_row(entry.index)
        self._board.words[row + WebWord.SLOTS] = self._board.words[row + WebWord.SLOTS_IN_USE] = 0
        holders = [each for each in self._batchers if entry.index in each.segments]
        self.table.await_retire(entry, [each.index for each in holders], lambda: self._unlink(self.table.remove(entry)))
        for batcher in holders:
            batcher.segments.discard(entry.index)
            batcher.send(RetireSegment(entry.index))

    def _unlink(self, entry: SegmentEntry) -> None:
        name = segment_name(self._prefix, entry.index)
        unlink(name)
        Doorbell.unlink(name)
