"""The supervisor's control socket, when one of its connections goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.control.server import ControlServer, Peer
from wsgi_ts.errors import ServiceUnavailable
from wsgi_ts.run_files import RunFiles


def answer(peer: Peer, arguments: dict[str, Any]) -> Any:
    """What was asked for; `never` cannot be said in JSON."""
    return object() if arguments.get("never") else arguments


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlPlane]:
    server = ControlServer(RunFiles(tmp_path).control_socket, {"answer": answer})
    server.start()
    plane = ControlPlane(tmp_path)
    yield plane
    plane.close()
    server.stop()


def test_a_connection_that_gets_no_thread_is_closed_and_the_next_is_served(
    control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ServiceUnavailable):
            control.call("answer", timeout_s=60)
    assert control.call("answer", timeout_s=60, number=7) == {"number": 7}


def test_an_answer_that_cannot_be_sent_costs_one_call(control: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServiceUnavailable):
        control.call("answer", timeout_s=60, never=True)
    assert control.call("answer", timeout_s=60, number=7) == {"number": 7}
    assert "unexpected error" in caplog.text
