"""The control socket: what an operation may be asked with, and what its own faults are answered as."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.control.server import ControlServer, Operation, Peer
from wsgi_ts.errors import ServerError


def greet(*, name: str, times: int = 1) -> str:
    return "hello " + name * times


def who(*, peer: Peer) -> int:
    return peer.pid


def faulty() -> Any:
    return len(None)  # type: ignore[arg-type]


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlPlane]:
    operations = {"greet": Operation(greet), "who": Operation(who, told_peer=True), "faulty": Operation(faulty)}
    server = ControlServer(tmp_path / "control.sock", operations)
    server.start()
    control = ControlPlane(tmp_path)
    yield control
    control.close()
    server.stop()


def refused(control: ControlPlane, operation: str, **arguments: Any) -> tuple[int, str]:
    """Status and message of an operation's error."""
    with pytest.raises(ServerError) as caught:
        control.call(operation, **arguments)
    return caught.value.status, caught.value.message


def test_arguments_are_checked_against_the_operation(control: ControlPlane) -> None:
    assert control.call("greet", name="you") == "hello you"
    assert refused(control, "greet") == (400, "Wrong arguments: missing a required argument: 'name'")
    status, message = refused(control, "greet", name="you", nmae="you")
    assert (status, "unexpected keyword argument 'nmae'" in message) == (400, True)


@pytest.mark.parametrize("name", ["you", "é\ud800\n", '"', "\U0001f600"])
def test_a_long_text_is_answered_as_it_is(control: ControlPlane, name: str) -> None:
    for times in (1, 65536, 1_000_000):
        assert control.call("greet", name=name, times=times) == "hello " + name * times
        assert control.call("greet", name="you") == "hello you", "the next answer begins where this one ends"


def test_a_fault_of_the_operation_is_no_fault_of_the_arguments(
    control: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert refused(control, "faulty") == (500, "The server failed to carry out the operation.")
    assert "TypeError: object of type 'NoneType' has no len()" in caplog.text


def test_nobody_can_say_to_be_another(control: ControlPlane) -> None:
    assert control.call("who", peer={"pid": 1}) == os.getpid()
