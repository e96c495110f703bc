"""Records on their way from one process to another: what arrives, and what is lost without harm."""

from __future__ import annotations

import json
import selectors
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.tracing import post as posting
from wsgi_ts.tracing.post import Inlet, Post


class Receiver:
    """An inlet with a selector of its own."""

    def __init__(self, path: Path) -> None:
        self.selector = selectors.DefaultSelector()
        self.got: list[dict[str, Any]] = []
        self.inlet = Inlet(path, self.selector, lambda line: self.got.append(json.loads(line)))

    def turn(self) -> None:
        """Takes all that is there."""
        while ready := self.selector.select(0):
            for key, _ in ready:
                key.data()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(tmp_path / "x.sock")
    yield made
    made.inlet.close()


def test_records_arrive_in_their_order(receiver: Receiver, tmp_path: Path) -> None:
    first, second = Post(tmp_path / "x.sock"), Post(tmp_path / "x.sock")
    for number in range(100):
        first.send({"number": number, "text": "a\nb" * 100})
        second.send({"number": -number})
    receiver.turn()
    assert [each["number"] for each in receiver.got if "text" in each] == list(range(100))
    assert len(receiver.got) == 200
    assert first.lost == second.lost == 0
    for each in (first, second):
        each.close()
    receiver.turn()


def test_where_nobody_listens_a_record_is_lost(tmp_path: Path) -> None:
    post = Post(tmp_path / "x.sock")
    post.send({})
    post.send({})
    assert post.lost == 2
    post.close()


def test_who_comes_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posting, "_RETRY_S", 0.0)
    post = Post(tmp_path / "x.sock")
    post.send({"number": 1})
    for number in (2, 3):
        receiver = Receiver(tmp_path / "x.sock")
        post.send({"number": number})  # to one that has ended, the second time
        post.send({"number": number})
        receiver.turn()
        assert {"number": number} in receiver.got
        receiver.inlet.close()
    post.close()


def test_one_that_does_not_keep_up_costs_records_and_no_wait(receiver: Receiver, tmp_path: Path) -> None:
    post = Post(tmp_path / "x.sock")
    for _ in range(2000):
        post.send({"text": "x" * 1000})
    assert post.lost > 0
    receiver.turn()
    post.flush()
    receiver.turn()
    post.send({"last": True})
    receiver.turn()
    assert receiver.got[-1] == {"last": True}
    assert len(receiver.got) == 2001 - post.lost
    post.close()


def test_records_may_wait_for_others(receiver: Receiver, tmp_path: Path) -> None:
    post = Post(tmp_path / "x.sock")
    post.gather = 1000
    post.send({"number": 1})
    receiver.turn()
    assert receiver.got == []
    post.flush()
    receiver.turn()
    assert receiver.got == [{"number": 1}]
    post.send({"number": 2})
    post.send({"number": 3, "text": "x" * 1000})
    receiver.turn()
    assert [each["number"] for each in receiver.got] == [1, 2, 3]
    post.close()


def test_while_the_kernel_has_no_room_it_is_not_asked_for_each_record(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = Post(tmp_path / "x.sock")
    post.gather = 10_000
    tries: list[int] = []
    flush = post.flush
    monkeypatch.setattr(post, "flush", lambda: tries.append(len(tries)) or flush())
    for _ in range(2000):
        post.send({"text": "x" * 1000})
    for _ in range(3):
        receiver.turn()
        flush()
    receiver.turn()
    post.close()
    assert len(tries) <= 2000 / 9
    assert len(receiver.got) == 2000 - post.lost


def test_a_line_without_end_is_not_kept(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posting, "MOST_LINE", 1000)
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "x.sock"))
        sock.sendall(b"x" * 2000)
        receiver.turn()
        assert sock.recv(1) == b""
    assert receiver.got == []


def test_the_socket_is_for_its_user_only(receiver: Receiver, tmp_path: Path) -> None:
    assert (tmp_path / "x.sock").stat().st_mode & 0o777 == 0o600
