from __future__ import annotations

import pytest

from wsgi_ts.supervisor.segment_table import SegmentEntry, SegmentTable


class Calls:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def table() -> SegmentTable:
    return SegmentTable()


@pytest.fixture
def done() -> Calls:
    return Calls()


def ready(table: SegmentTable, *batchers: int) -> SegmentEntry:
    entry = table.new(100)
    table.await_attach(entry, batchers, Calls())
    for batcher in batchers:
        table.attached(entry.index, batcher)
    return entry


def test_a_number_that_was_not_used_is_given_again(table: SegmentTable) -> None:
    made = ready(table)
    assert table.unused(made.pid) is None
    waiting = table.new(made.pid)
    assert table.unused(made.pid) is waiting
    assert table.unused(1) is None
    table.await_retire(waiting, [0], Calls())
    assert table.unused(made.pid) is None


def test_numbers_are_never_used_again(table: SegmentTable) -> None:
    first = table.new(1)
    table.remove(first)
    assert table.new(1).index != first.index


def test_attached_when_the_last_batcher_has_it(table: SegmentTable, done: Calls) -> None:
    entry = table.new(1)
    assert table.attachable() == []
    table.await_attach(entry, [0, 1], done)
    table.attached(entry.index, 0)
    table.attached(entry.index, 0)
    assert done.count == 0
    table.attached(entry.index, 1)
    assert done.count == 1
    assert table.attachable() == [entry.index]


def test_without_batchers_nothing_is_waited_for(table: SegmentTable, done: Calls) -> None:
    table.await_attach(table.new(1), [], done)
    assert done.count == 1


def test_a_dead_batcher_is_not_waited_for(table: SegmentTable, done: Calls) -> None:
    entry = table.new(1)
    table.await_attach(entry, [0, 1], done)
    table.attached(entry.index, 1)
    table.batcher_lost(0)
    assert done.count == 1


def test_retired_when_no_batcher_runs_into_it_any_more(table: SegmentTable, done: Calls) -> None:
    entry = ready(table, 0, 1)
    table.await_retire(entry, [0, 1], done)
    assert table.attachable() == []
    table.retired(entry.index, 0)
    table.batcher_lost(1)
    assert done.count == 1


def test_owner_that_dies_before_its_segment_is_attached(table: SegmentTable, done: Calls) -> None:
    entry, attached = table.new(1), Calls()
    table.await_attach(entry, [0], attached)
    table.await_retire(entry, [0], done)
    # The answer to the attach was under way.
    table.attached(entry.index, 0)
    assert (attached.count, done.count) == (0, 0)
    table.retired(entry.index, 0)
    assert (attached.count, done.count) == (0, 1)


def test_late_answers_about_a_removed_segment_are_ignored(table: SegmentTable) -> None:
    entry = ready(table, 0)
    table.remove(entry)
    table.attached(entry.index, 0)
    table.retired(entry.index, 0)
    assert table.get(entry.index) is None
