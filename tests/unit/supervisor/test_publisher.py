"""What the data path is told, also where the run directory has no room for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.registry import Registry
from wsgi_ts.security.tokens import KeyFileError
from wsgi_ts.supervisor.publisher import Publisher


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory.acquire(tmp_path / "run")
    yield directory
    directory.release()


@pytest.fixture
def board(directory: RunDirectory) -> Iterator[Board]:
    board = Board.create(directory.prefix)
    yield board
    board.close()


@pytest.fixture
def publisher(directory: RunDirectory, board: Board) -> Publisher:
    return Publisher(Registry(Numbers(9000)), board, directory)


class NoRoom:
    """Has a file of the run directory not be written, as on a full disk."""

    def __init__(self, file: Path) -> None:
        self._obstacle = file.with_name(f".new-{file.name}")

    def __enter__(self) -> None:
        self._obstacle.mkdir()

    def __exit__(self, *_: object) -> None:
        self._obstacle.rmdir()


def test_routes_are_there_before_the_epoch_tells_of_them(
    publisher: Publisher, board: Board, directory: RunDirectory
) -> None:
    publisher.routes()
    assert json.loads(directory.routes.read_text())["epoch"] == board.epoch == 1
    publisher.follow(0.0)
    publisher.routes()
    assert board.epoch == 1, "what is no news is not published again"


def test_routes_that_could_not_be_written_are_written_later(
    publisher: Publisher, board: Board, directory: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with NoRoom(directory.routes):
        publisher.routes()
        publisher.follow(0.0)
    assert board.epoch == 0
    assert "routes.json cannot be written" in caplog.text
    publisher.follow(0.0)
    assert board.epoch == 1
    assert directory.routes.exists()


def test_tokens_that_could_not_be_written_are_told(publisher: Publisher, board: Board, directory: RunDirectory) -> None:
    with NoRoom(directory.tokens), pytest.raises(KeyFileError, match=r"tokens\.json cannot be written"):
        publisher.tokens({})
    assert board.words[layout.BOARD_TOKEN_EPOCH] == 0
