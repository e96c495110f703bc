"""Fixtures for all tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support import made
from support.archives import archive
from support.server import ServerProcess

#: Modules that take longest: what begins last should be short. The others follow as they are collected.
_LONGEST_FIRST = (
    "integration/test_example_pages.py",
    "integration/test_groups.py",
    "integration/test_kserve_sdk.py",
    "integration/test_large_models.py",
    "reliability/test_workflows.py",
    "reliability/test_kill.py",
    "integration/test_snapshots.py",
    "integration/test_tune.py",
    "integration/test_ray.py",
    "integration/test_data_path.py",
    "integration/test_autoscaling.py",
    "integration/test_console.py",
    "integration/test_input_corpus.py",
    "integration/test_tuning_page.py",
    "integration/test_tutorials.py",
    "integration/test_grpc_server.py",
    "abuse/test_handler_behaviours.py",
    "reliability/test_moments.py",
    "reliability/test_environment.py",
    "integration/test_upgrade.py",
    "reliability/test_supervisor.py",
    "reliability/test_negative_controls.py",
    "reliability/test_kills.py",
    "integration/test_tls.py",
    "integration/test_handlers.py",
    "integration/test_tutorial_encoder.py",
    "unit/handlers/toolkit/test_transformers_versions.py",
    "unit/handlers/distributed/test_distributed_ranks.py",
    "integration/test_metrics.py",
    "integration/test_logs.py",
    "integration/test_environments.py",
    "integration/test_model_config.py",
    "integration/test_start_failures.py",
    "integration/test_tokens.py",
    "unit/handlers/toolkit/test_library_names.py",
    "unit/handlers/bundled/test_handler_base.py",
    "integration/test_management.py",
    "integration/test_openapi.py",
    "reliability/test_poison.py",
    "integration/test_group_nodes.py",
    "unit/cli/test_cli.py",
)


# A test must not fail because the machine is busy with others.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# What is imported and collected stays to the end: looking for garbage in it, then and later, would cost seconds.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Before the processes that run tests are started, which share what the examples' scripts make."""
    if made.begin():
        config.add_cleanup(made.end)


def pytest_collection_finish() -> None:
    """From here on garbage is collected, of what comes now."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest modules first; a module's tests run in one process, so that a server they share starts once."""
    root = Path(__file__).parent
    places = {root / name: place for place, name in enumerate(_LONGEST_FIRST)}
    assert all(path.exists() for path in places), "a module of _LONGEST_FIRST has another name by now"
    items.sort(key=lambda item: places.get(item.path, len(places)))


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


@pytest.fixture
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of benchmarks/ can be imported; afterwards they are forgotten, since others have their names."""
    folder = str(Path(__file__).resolve().parents[1] / "benchmarks")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]
