"""Which segments there are, whose they are, and which batchers still have to say something about them.

Pure bookkeeping of the supervisor's main thread: it sends nothing and removes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import field

from wsgi_ts.quick_dataclass import dataclass


@dataclass(slots=True)
class SegmentEntry:
    """One segment.

    Attributes:
        index: its number; never used again by this instance.
        pid: the web worker that owns it.
        is_ready: its owner has made it.
        is_retired: its owner is dead.
        pending: the batchers that have not yet attached it, or, once it is retired, not yet let go of it.
        on_settled: called when nothing is pending any more.
    """

    index: int
    pid: int
    is_ready: bool = False
    is_retired: bool = False
    pending: set[int] = field(default_factory=set)
    on_settled: Callable[[], None] | None = None


class SegmentTable:
    """All segments of an instance."""

    def __init__(self) -> None:
        self._entries: dict[int, SegmentEntry] = {}
        self._next = 1

    def new(self, pid: int) -> SegmentEntry:
        """A number for a segment that process `pid` is about to make."""
        entry = SegmentEntry(self._next, pid)
        self._next += 1
        self._entries[entry.index] = entry
        return entry

    def unused(self, pid: int) -> SegmentEntry | None:
        """The segment that process `pid` got a number for and has not made."""
        waiting = (each for each in self._entries.values() if not each.is_ready and not each.is_retired)
        return next((each for each in waiting if each.pid == pid), None)

    def get(self, index: int) -> SegmentEntry | None:
        """The entry of a segment."""
        return self._entries.get(index)

    def all(self) -> list[SegmentEntry]:
        """All segments."""
        return list(self._entries.values())

    def attachable(self) -> list[int]:
        """The segments that a new batcher has to attach."""
        return [each.index for each in self._entries.values() if each.is_ready and not each.is_retired]

    def await_attach(self, entry: SegmentEntry, batchers: Iterable[int], done: Callable[[], None]) -> None:
        """The owner has made the segment: `done` is called when all these batchers have attached it."""
        entry.is_ready = True
        self._await(entry, batchers, done)

    def await_retire(self, entry: SegmentEntry, batchers: Iterable[int], done: Callable[[], None]) -> None:
        """The owner is dead: `done` is called when none of these batchers runs anything into it any more."""
        entry.is_retired = True
        # Whoever waits for it to be attached is the owner.
        entry.on_settled = None
        self._await(entry, batchers, done)

    def attached(self, index: int, batcher: int) -> None:
        """A batcher has attached a segment."""
        entry = self._entries.get(index)
        if entry is not None and not entry.is_retired:
            self._settle(entry, batcher)

    def retired(self, index: int, batcher: int) -> None:
        """A batcher has let go of a segment."""
        entry = self._entries.get(index)
        if entry is not None and entry.is_retired:
            self._settle(entry, batcher)

    def batcher_lost(self, batcher: int) -> None:
        """A batcher is dead: its successor attaches what is there, and nobody runs into what is retired."""
        for entry in self.all():
            self._settle(entry, batcher)

    def remove(self, entry: SegmentEntry) -> SegmentEntry:
        """Forgets a segment, and returns it."""
        return self._entries.pop(entry.index)

    def _await(self, entry: SegmentEntry, batchers: Iterable[int], done: Callable[[], None]) -> None:
        entry.pending = set(batchers)
        entry.on_settled = done
        self._settle(entry, -1)

    @staticmethod
    def _settle(entry: SegmentEntry, batcher: int) -> None:
        entry.pending.discard(batcher)
        if not entry.pending and entry.on_settled is not None:
            done, entry.on_settled = entry.on_settled, None
            done()
