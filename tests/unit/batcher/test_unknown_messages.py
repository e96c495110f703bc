"""What one process says and another does not understand is told in the log, and harms nothing."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import pytest

from wsgi_ts.batcher.__main__ import Batcher
from wsgi_ts.batcher.pool.pool import WorkerPool
from wsgi_ts.supervisor.batchers import BatcherTier


class FakeChannel:
    """A channel on which some messages have come."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self._messages = list(messages)

    def receive_ready(self) -> list[dict[str, Any]]:
        return self._messages


@pytest.mark.parametrize("message", [{"event": "new_in_2.0", "worker_id": 1}, {}])
def test_from_a_batcher(message: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    class Link:
        name = "batcher 1 (cpu)"
        channel = FakeChannel(message)

    tier = BatcherTier.__new__(BatcherTier)
    tier._on_events(cast("Any", Link()))
    assert f"Unknown event {message.get('event')!r} from batcher 1 (cpu)" in caplog.text


@pytest.mark.parametrize("message", [{"op": "new_in_2.0"}, {}])
def test_from_the_supervisor(message: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    batcher = Batcher.__new__(Batcher)
    batcher._supervisor = cast("Any", FakeChannel(message))
    batcher._from_supervisor()
    assert f"Unknown operation {message.get('op')!r} from the supervisor" in caplog.text


@pytest.mark.parametrize("message", [{"event": "new_in_2.0", "worker_id": 1}, {"event": "odd"}, {}])
def test_from_the_template(message: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert WorkerPool().on_template_event(message, 1.0) == []
    assert f"Unknown event {message.get('event')!r} from the worker template" in caplog.text


def test_from_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher.__new__(Batcher)
    batcher._notices = deque([("model_unloaded", 3), ("odd", 1)])
    monkeypatch.setattr("wsgi_ts.batcher.__main__.os.eventfd_read", lambda fd: 1)
    batcher._wake_fd = -1
    with pytest.raises(ValueError, match="odd"):
        batcher._from_loop()
