"""What a supervisor begins with, and what its snapshots and its guard know meanwhile."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.archive.manifest import Manifest
from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.errors import ConflictStatus, InvalidModel
from wsgi_ts.gpu.assign import place
from wsgi_ts.messages import ModelSpec
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.recorded import RecordedModel, SnapshotError
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.snapshots import SnapshotWriter
from wsgi_ts.models.startup import StartupModels, models_to_start
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.settings.config import Config

ENTRY = {"defaultVersion": True, "marName": "m.mar", "minWorkers": 2, "batchSize": 4}


class Manager:
    """Stands for the operations: notes what it is asked for, and adds models to the registry."""

    def __init__(self, registry: Registry) -> None:
        self.asked: list[str] = []
        self.fails = ""
        self._registry = registry
        self.snapshots: SnapshotWriter | None = None

    def expect(self, recorded: Any) -> None:
        self.asked.append(f"expect {len(recorded)}")

    def restore(self, recorded: RecordedModel) -> None:
        self.asked.append(f"restore {recorded.name}")
        if self.fails == recorded.name:
            raise InvalidModel("broken")
        self._add(recorded.name, recorded.at_startup)
        # Somebody's operation ends in the middle of the start.
        assert self.snapshots is not None
        self.snapshots.record()

    def register(self, *, url: str, model_name: str | None, synchronous: bool, at_startup: bool) -> None:
        name = model_name or url.removesuffix(".mar")
        self.asked.append(f"register {name}")
        if name in {each.name for each in self._registry.all_versions()}:
            raise ConflictStatus("there already")
        self._add(name, at_startup)

    def _add(self, name: str, at_startup: bool) -> None:
        manifest = Manifest(name, "1.0", "h.py", "python", None, None, None, None, {})
        directory = ModelDirectory(Path("/models/x"), manifest, f"{name}.mar", True)
        spec = ModelSpec(self._registry.numbers.allocate_index(), name, "1.0", "/models/x", "h.py", None)
        self._registry.add(ModelVersion(spec, directory, None, place(0), loaded_at_startup=at_startup))


@pytest.fixture
def config() -> Config:
    return dataclasses.replace(Config(), no_config_snapshots=True, load_models=((None, "a.mar"), (None, "b.mar")))


def start(config: Config, kept: dict[str, Any] | None, fails: str = "") -> tuple[list[str], list[dict[str, Any]]]:
    """Runs a start; returns what the manager was asked for and what the guard was told."""
    registry, remembered = Registry(Numbers(9000)), list[dict[str, Any]]()
    manager = Manager(registry)
    manager.fails = fails
    manager.snapshots = SnapshotWriter(config, registry, remembered.append)
    first = models_to_start(config, kept)
    StartupModels(config, first, registry, manager, manager.snapshots).register(lambda: None)  # type: ignore[arg-type]
    return manager.asked, remembered


def test_settings_of_a_model_that_nothing_loads_are_warned_of(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"a": {"1.0": ENTRY}, "vgg": {"1.0": ENTRY}}
    start(dataclasses.replace(config, models=settings), None)
    assert [record.message for record in caplog.records if record.message.startswith("models:")] == [
        "models: no model vgg is loaded now, so its settings wait until one is registered; load_models (--models) says "
        "what is loaded, and NAME=FILE.mar under which name"
    ]


def test_a_fresh_start_takes_the_models_of_the_configuration(config: Config) -> None:
    asked, remembered = start(config, None)
    assert asked == ["register a", "register b"]
    (told,) = remembered
    assert told["started"]
    assert {name: told["models"][name]["1.0"]["atStartup"] for name in told["models"]} == {"a": True, "b": True}


def test_the_next_supervisor_takes_what_the_last_one_had(config: Config) -> None:
    kept = {"started": True, "models": {"m": {"1.0": ENTRY}, "b": {"1.0": ENTRY | {"atStartup": True}}}}
    asked, remembered = start(config, kept)
    assert asked == ["expect 2", "restore m", "restore b", "expect 0"]
    # After each change the guard has all of them, whether their turn has come or not.
    assert [told["models"].keys() for told in remembered] == [{"m", "b"}] * 3
    assert [told["started"] for told in remembered] == [False, False, True]
    assert "atStartup" not in remembered[-1]["models"]["m"]["1.0"]
    assert remembered[-1]["models"]["b"]["1.0"]["atStartup"]


def test_a_start_that_was_cut_off_goes_on(config: Config) -> None:
    """The last supervisor had registered two models when it died, one of them of the configuration."""
    kept = {"started": False, "models": {"m": {"1.0": ENTRY}, "a": {"1.0": ENTRY}}}
    asked, remembered = start(config, kept)
    assert asked == ["expect 2", "restore m", "restore a", "expect 0", "register a", "register b"]
    assert remembered[-1]["models"].keys() == {"m", "a", "b"}


def test_a_model_that_cannot_be_restored_stays_known(config: Config) -> None:
    kept = {"started": True, "models": {"m": {"1.0": ENTRY}, "n": {"1.0": ENTRY}}}
    asked, remembered = start(config, kept, fails="m")
    assert asked == ["expect 2", "restore m", "restore n", "expect 0"]
    assert remembered[-1]["models"]["m"]["1.0"] == ENTRY


def test_damaged_models_are_told(config: Config) -> None:
    with pytest.raises(SnapshotError, match="as the last supervisor has left them"):
        models_to_start(config, {"started": True, "models": {"m": {"1.0": {}}}})
