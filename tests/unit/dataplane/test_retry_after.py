"""When a refused client may come again, from what stands on the board."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import ModelWord
from wsgi_ts.dataplane.retry_after import LONGEST_S, RetryAfter
from wsgi_ts.dataplane.routes import Target

SECOND = 1_000_000_000
TARGET = Target("m", None, model=3, batchers=(0, 1))


@pytest.fixture
def board() -> Iterator[Board]:
    prefix = f"wsgits-{secrets.token_hex(4)}"
    board = Board.create(prefix, 2)
    yield board
    board.close()
    Board.unlink(prefix)


def count(board: Board, batcher: int, **words: int) -> None:
    row = board.model_row(batcher, TARGET.model)
    for name, value in words.items():
        board.words[row + getattr(ModelWord, name)] = value


def test_what_waits_is_shared_among_the_workers(board: Board) -> None:
    count(board, 0, READY_WORKERS=2, OUTSTANDING=60, LATENCY_BUCKETS=5, SERVICE_US=1_000_000)
    count(board, 1, READY_WORKERS=1, OUTSTANDING=31, LATENCY_BUCKETS=5, SERVICE_US=1_000_000)
    # 91 requests of 0.2 s on three workers.
    assert RetryAfter(board).seconds(TARGET, SECOND) == 7


def test_what_a_request_costs_follows_the_model(board: Board) -> None:
    predictions = RetryAfter(board)
    count(board, 0, READY_WORKERS=1, OUTSTANDING=100, LATENCY_BUCKETS=10, SERVICE_US=10_000)
    assert predictions.seconds(TARGET, SECOND) == 1
    count(board, 0, LATENCY_BUCKETS=20, SERVICE_US=1_010_000)
    assert predictions.seconds(TARGET, SECOND + SECOND // 20) == 1, "what was just read is used again"
    assert predictions.seconds(TARGET, SECOND + SECOND // 2) == 1, "one batch more says little"
    assert predictions.seconds(TARGET, 3 * SECOND) == 10


def test_before_anything_was_answered_nothing_is_known(board: Board) -> None:
    count(board, 0, READY_WORKERS=1, OUTSTANDING=100)
    assert RetryAfter(board).seconds(TARGET, SECOND) == 1


def test_a_worker_that_is_on_its_way_back_is_waited_for(board: Board) -> None:
    predictions = RetryAfter(board)
    count(board, 0, READY_WORKERS=0, OUTSTANDING=10, LATENCY_BUCKETS=1, SERVICE_US=500_000)
    assert predictions.seconds(TARGET, SECOND) == 5
    count(board, 0, OUTSTANDING=0)
    assert predictions.seconds(TARGET, 2 * SECOND) == 0, "nobody serves it, and nobody waits: who knows when"


def test_a_number_that_belongs_to_another_model_now_begins_anew(board: Board) -> None:
    predictions = RetryAfter(board)
    count(board, 0, READY_WORKERS=1, OUTSTANDING=10, LATENCY_BUCKETS=100, SERVICE_US=100_000_000)
    assert predictions.seconds(TARGET, SECOND) == 10
    count(board, 0, LATENCY_BUCKETS=1, SERVICE_US=3_000_000)
    assert predictions.seconds(TARGET, 2 * SECOND) == 30
    count(board, 0, OUTSTANDING=10**6)
    assert predictions.seconds(TARGET, 3 * SECOND) == LONGEST_S
