"""What a model worker counts in its mailbox, and its batcher takes from there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from wsgi_ts.batcher.shm.mailbox import BatcherMailbox, WorkerMailbox
from wsgi_ts.batcher.shm.worker_layout import MAIL_TALLY_MOVES, MAIL_WORDS, TALLIED, Tally


@pytest.fixture
def mailbox() -> Iterator[BatcherMailbox]:
    made = BatcherMailbox(f"wsgi-ts-tally-{os.getpid()}", 4)
    yield made
    made.remove()


def test_each_count_is_taken_once(mailbox: BatcherMailbox) -> None:
    worker = WorkerMailbox(mailbox.name)
    assert (mailbox.take_executions(), mailbox.take_tallies()) == (0, [])
    for _ in range(3):
        worker.count_execution()
    worker.count(Tally.LATE)
    worker.count(Tally.HANDLER_ERRORS)
    worker.count(Tally.HANDLER_ERRORS)
    # In either order: what both tell of is taken by one of them.
    taken = mailbox.take_tallies()
    assert (taken[Tally.LATE], taken[Tally.HANDLER_ERRORS], sum(taken)) == (1, 2, 3)
    assert mailbox.take_executions() == 3
    worker.count_execution()
    worker.count(Tally.OTHER)
    assert mailbox.take_executions() == 1
    assert mailbox.take_tallies() == [int(tally == Tally.OTHER) for tally in range(len(TALLIED))]
    assert (mailbox.take_executions(), mailbox.take_tallies()) == (0, [])
    worker.close()


def test_the_words_are_before_the_places() -> None:
    numbers = [value for name, value in vars(Tally).items() if name.isupper()]
    assert sorted(numbers) == list(range(len(TALLIED)))
    assert MAIL_TALLY_MOVES < MAIL_WORDS
