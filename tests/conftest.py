"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.server import ServerProcess

#: Modules and groups that take longest: what begins last should be short. The others follow as they are collected.
_LONGEST_FIRST = (
    "tutorial digits",
    "chaos/test_kill.py",
    "integration/test_data_path.py",
    "tutorial encoder",
    "tutorial densenet161",
    "tutorial large_models",
    "integration/test_large_models.py",
    "unit/handlers/test_handler_base.py",
    "integration/test_groups.py",
    "integration/test_snapshots.py",
    "integration/test_metrics.py",
    "integration/test_environments.py",
    "integration/test_grpc_server.py",
    "unit/handlers/test_distributed_ranks.py",
    "integration/test_logs.py",
    "integration/test_input_corpus.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a module's tests in one process (`--dist loadgroup`), so that a server they share starts once."""
    root = Path(__file__).parent
    places = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    order = {}
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        if mark is None:
            group = item.path.relative_to(root).as_posix()
            item.add_marker(pytest.mark.xdist_group(group))
        else:
            group = mark.args[0]
        order[item] = places.get(group, len(places))
    items.sort(key=lambda item: order[item])


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
