"""What one process says and another does not understand is told in the log, and harms nothing."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast, get_args
from unittest.mock import MagicMock

import pytest

from wsgi_ts.batcher.batcher import Batcher
from wsgi_ts.batcher.scheduler.loop import Notice
from wsgi_ts.batcher.template.template import Template
from wsgi_ts.control.channel import Channel
from wsgi_ts.control.codec import FROM_BATCHER, FROM_TEMPLATE, TO_BATCHER, TO_TEMPLATE, Messages
from wsgi_ts.messages import (
    LoadModel,
    ModelSpec,
    SetWorkers,
    SpawnWorker,
    WantedWorker,
    WorkerExited,
    WorkerReport,
    WorkerState,
)
from wsgi_ts.supervisor.batchers import Batchers


@pytest.fixture
def channel(frame: dict[str, Any]) -> Iterator[Channel]:
    """A channel on which a frame has come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(theirs).send(frame)
        yield Channel(ours)


@pytest.mark.parametrize("frame", [{"event": "new_in_2.0", "worker_id": 1}, {}, {"event": "segment_attached"}])
def test_from_a_batcher(frame: dict[str, Any], channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    batchers = Batchers.__new__(Batchers)
    assert batchers._hear(cast("Any", SimpleNamespace(name="batcher 1 (cpu)", inbox=channel)))
    assert f"Unknown event {frame.get('event')!r} from batcher 1 (cpu)" in caplog.text


@pytest.mark.parametrize("frame", [{"op": "new_in_2.0"}, {}, {"op": "attach_segment", "index": 1, "odd": 2}])
def test_from_the_supervisor(frame: dict[str, Any], channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    batcher = Batcher.__new__(Batcher)
    batcher._supervisor = channel
    batcher._from_supervisor()
    assert f"Unknown operation {frame.get('op')!r} from the supervisor" in caplog.text


@pytest.mark.parametrize("frame", [{"event": "new_in_2.0", "worker_id": 1}, {"event": "odd"}, {}])
def test_from_the_template(frame: dict[str, Any], channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    batcher = Batcher.__new__(Batcher)
    batcher._templates = [channel]
    batcher._from_template(channel)
    assert f"Unknown event {frame.get('event')!r} from the worker template" in caplog.text


@pytest.mark.parametrize("frame", [{"op": "new_in_2.0"}, {"op": "kill_worker", "worker_id": 1}, {}])
def test_from_the_batcher(frame: dict[str, Any], channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    template = Template.__new__(Template)
    template._batcher = channel
    template._on_batcher()
    assert f"Unknown operation {frame.get('op')!r} from the batcher" in caplog.text


SPEC = ModelSpec(1, "m", "1.0", "/models/m", "handler.py", {"a": [1]})


@pytest.mark.parametrize(
    ("messages", "message", "name"),
    [
        (TO_BATCHER, LoadModel(SPEC), "load_model"),
        (TO_BATCHER, SetWorkers(1, [WantedWorker(9000, 0, [0, 1]), WantedWorker(9001)]), "set_workers"),
        (TO_TEMPLATE, SpawnWorker(9000, 2, SPEC, None, None, "p", 0, 1), "spawn_worker"),
        (FROM_TEMPLATE, WorkerExited(9000, 2, 77, None, "SIGKILL", ["Bye"]), "worker_exited"),
        (FROM_BATCHER, WorkerReport(9000, 1, WorkerState.READY, last_lines=["x"]), "worker_report"),
    ],
)
def test_a_message_arrives_as_it_was_sent(messages: Messages[Any], message: Any, name: str) -> None:
    frame = json.loads(json.dumps(messages.encode(message)))
    assert name in (frame.get("op"), frame.get("event"))
    assert messages.decode(frame) == message


@pytest.mark.parametrize("kind", get_args(Notice))
def test_every_notice_of_the_loop_is_taken(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher.__new__(Batcher)
    batcher._notices = deque([kind(*range(len(dataclasses.fields(kind))))])
    monkeypatch.setattr("wsgi_ts.batcher.batcher.os.eventfd_read", lambda fd: 1)
    batcher._wake_fd = -1
    batcher._pool, batcher._supervisor = MagicMock(), MagicMock()
    monkeypatch.setattr(batcher, "_carry_out", taken := MagicMock())
    batcher._from_loop()
    assert taken.called or batcher._supervisor.send.called
