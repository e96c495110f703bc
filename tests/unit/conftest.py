"""Fixtures of several unit tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from wsgi_ts.supervisor.child_process import Child


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """A list for the children that a test starts, which are killed when it ends."""
    made: list[Child] = []
    yield made
    for child in made:
        child.send_signal(signal.SIGKILL)
        child.wait(60.0)
        child.close()
