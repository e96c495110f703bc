"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.server import ServerProcess


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty model store."""
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers, with `ServerProcess`'s arguments; all are stopped and looked after when the test ends."""
    with ExitStack() as running:
        yield lambda **arguments: running.enter_context(ServerProcess(**arguments))


@pytest.fixture(scope="module")
def echo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for a module's tests, with the model `echo` on one worker."""
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    with ServerProcess(store=store, web_workers=2, **_LARGE) as server:
        reply = server.register("echo.mar")
        assert reply.status == 200, reply.text
        yield server


#: Bodies of a few megabytes pass, and an oversize one can be made without trouble.
_LARGE: dict[str, Any] = {
    "config": {"max_request_size": str(8 << 20), "max_response_size": str(8 << 20), "job_queue_size": "1000"}
}
