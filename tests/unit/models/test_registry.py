from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from wsgi_ts.archive.manifest import Manifest
from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.batcher.shm.layout import MAX_MODELS
from wsgi_ts.errors import (
    ConflictStatus,
    InvalidModelVersion,
    ModelNotFound,
    ModelVersionNotFound,
    OutOfResources,
)
from wsgi_ts.gpu.assign import place
from wsgi_ts.messages import ModelSpec, WorkerReport
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion, WorkerRecord


@pytest.fixture
def registry() -> Registry:
    return Registry(Numbers(9000))


def add(registry: Registry, name: str, version: str = "1.0", workers: int = 0) -> ModelVersion:
    manifest = Manifest(name, version, "h.py", "python", None, None, None, None, {})
    directory = ModelDirectory(Path("/models/x"), manifest, f"{name}.mar", True)
    spec = ModelSpec(registry.numbers.allocate_index(), name, version, "/models/x", "h.py", None)
    model = ModelVersion(spec, directory, None, place(0), min_workers=workers, max_workers=workers)
    for _ in range(workers):
        worker = WorkerRecord(registry.numbers.next_worker_id(), 0, None, 0)
        model.workers[worker.worker_id] = worker
        model.loaded_in.add(0)
    registry.add(model)
    return model


def report(model: ModelVersion, worker_id: int, state: str, **fields: object) -> WorkerReport:
    return WorkerReport(worker_id, model.spec.index, state, **fields)  # type: ignore[arg-type]


def test_first_version_is_the_default(registry: Registry) -> None:
    first = add(registry, "m", "1.0")
    second = add(registry, "m", "2.0")
    assert registry.get("m") is first
    assert registry.get("m", "2.0") is second
    registry.set_default("m", "2.0")
    assert registry.get("m") is second


def test_texts_of_what_is_not_there(registry: Registry) -> None:
    add(registry, "m")
    with pytest.raises(ModelNotFound) as no_model:
        registry.get("nope")
    assert no_model.value.message == "Model not found: nope"
    with pytest.raises(ModelVersionNotFound) as no_version:
        registry.get("m", "9")
    assert no_version.value.message == "Model version: 9 does not exist for model: m"
    with pytest.raises(ModelVersionNotFound) as no_default:
        registry.set_default("m", "9")
    assert no_default.value.message == "Model version 9 does not exist for model m"


def test_a_version_is_registered_once(registry: Registry) -> None:
    add(registry, "m")
    with pytest.raises(ConflictStatus, match=r"Model version 1\.0 is already registered for model m"):
        add(registry, "m")


def test_the_default_version_stays_while_there_are_others(registry: Registry) -> None:
    first, second = add(registry, "m", "1.0"), add(registry, "m", "2.0")
    for version in (None, "1.0"):
        with pytest.raises(InvalidModelVersion, match="Cannot remove default version for model m"):
            registry.begin_removal("m", version)
    registry.remove(registry.begin_removal("m", "2.0"))
    assert second.unloading
    registry.remove(registry.begin_removal("m"))
    assert first.unloading
    with pytest.raises(ModelNotFound):
        registry.get("m")


def test_worker_ids_are_never_used_again(registry: Registry) -> None:
    model = add(registry, "a", workers=2)
    registry.remove(registry.begin_removal("a"))
    other = add(registry, "b", workers=1)
    assert list(model.workers) == [9000, 9001]
    assert list(other.workers) == [9002]


def test_indexes_rest_before_they_are_used_again(registry: Registry) -> None:
    first = add(registry, "a").spec.index
    registry.remove(registry.begin_removal("a"))
    seen = [registry.numbers.allocate_index() for _ in range(MAX_MODELS)]
    assert seen[-1] == first
    assert len(set(seen)) == MAX_MODELS
    with pytest.raises(OutOfResources):
        registry.numbers.allocate_index()


def test_remove_twice_gives_the_index_back_once(registry: Registry) -> None:
    model = registry.begin_removal(add(registry, "a").name)
    registry.remove(model)
    registry.remove(model)
    seen = [registry.numbers.allocate_index() for _ in range(MAX_MODELS)]
    assert len(set(seen)) == MAX_MODELS


def test_functions_have_indexes_of_their_own(registry: Registry) -> None:
    model = add(registry, "w__functions")
    model.spec = replace(model.spec, functions={key: {"row": registry.numbers.allocate_index()} for key in ("f", "g")})
    with pytest.raises(OutOfResources):
        registry.numbers.allocate_indexes(MAX_MODELS - 2)
    registry.remove(registry.begin_removal("w__functions"))
    assert len(set(registry.numbers.allocate_indexes(MAX_MODELS))) == MAX_MODELS


class TestRoutes:
    def test_a_model_without_workers_has_no_batcher(self, registry: Registry) -> None:
        add(registry, "m")
        routes = registry.routes(7, 0.0)
        assert routes == {
            "epoch": 7,
            "healthy": True,
            "started": False,
            "ready": False,
            "draining": False,
            "workflows": {},
            "models": {
                "m": {
                    "default": "1.0",
                    "startup": False,
                    "versions": {
                        "1.0": {
                            "index": 0,
                            "batchers": {},
                            "client_timeout_ms": 0,
                            "continuous": False,
                            "sequences": False,
                            "loaded": False,
                        }
                    },
                }
            },
        }

    def test_versions_to_be_restored_are_known_and_have_no_worker(self, registry: Registry) -> None:
        registry.expect([("m", "2.0", True), ("m", "1.0", False), ("n", "1.0", True)])
        routes = registry.routes(1, 0.0)["models"]
        assert {name: model["default"] for name, model in routes.items()} == {"m": "2.0", "n": "1.0"}
        assert routes["m"]["versions"].keys() == {"1.0", "2.0"}
        assert all(each["batchers"] == {} for model in routes.values() for each in model["versions"].values())
        model = add(registry, "m", "2.0", workers=1)
        registry.apply_report(0, report(model, 9000, "ready"))
        versions = registry.routes(2, 0.0)["models"]["m"]["versions"]
        assert (versions["2.0"]["batchers"], versions["1.0"]["batchers"]) == ({"0": 1}, {})
        registry.expect([])
        assert registry.routes(3, 0.0)["models"].keys() == {"m"}
        assert registry.routes(3, 0.0)["models"]["m"]["versions"].keys() == {"2.0"}

    def test_a_batcher_gets_requests_once_it_knows_the_model(self, registry: Registry) -> None:
        model = add(registry, "m", workers=2)
        entry = registry.routes(1, 0.0)["models"]["m"]["versions"]["1.0"]
        assert (entry["batchers"], entry["loaded"]) == ({}, False)
        assert registry.apply_report(0, report(model, 9000, "starting"))
        entry = registry.routes(2, 0.0)["models"]["m"]["versions"]["1.0"]
        assert (entry["batchers"], entry["loaded"]) == ({"0": 2}, False)
        assert not registry.apply_report(0, report(model, 9000, "loading"))
        assert registry.apply_report(0, report(model, 9000, "ready"))
        assert registry.routes(3, 0.0)["models"]["m"]["versions"]["1.0"]["loaded"]

    def test_a_restarting_batcher_keeps_its_requests(self, registry: Registry) -> None:
        model = add(registry, "m", workers=1)
        registry.apply_report(0, report(model, 9000, "ready"))
        registry.batcher_lost(0)
        entry = registry.routes(1, 0.0)["models"]["m"]["versions"]["1.0"]
        assert (entry["batchers"], entry["loaded"]) == ({"0": 1}, False)
        assert model.workers[9000].is_pending

    def test_what_is_being_removed_is_not_routed(self, registry: Registry) -> None:
        add(registry, "m", "1.0")
        add(registry, "m", "2.0")
        registry.begin_removal("m", "2.0")
        assert list(registry.routes(1, 0.0)["models"]["m"]["versions"]) == ["1.0"]
        registry.remove(registry.get("m", "2.0"))
        registry.begin_removal("m")
        assert registry.routes(2, 0.0)["models"] == {}


class TestReports:
    def test_reports_of_unknown_models_and_workers_are_ignored(self, registry: Registry) -> None:
        model = add(registry, "m", workers=1)
        assert not registry.apply_report(0, WorkerReport(9000, 77, "ready"))
        registry.apply_report(0, report(model, 9999, "ready"))
        assert model.workers[9000].report is None

    def test_a_worker_that_failed_its_first_load_is_not_pending(self, registry: Registry) -> None:
        model = add(registry, "m", workers=1)
        worker = model.workers[9000]
        assert worker.is_pending
        registry.apply_report(0, report(model, 9000, "loading"))
        assert worker.is_pending
        registry.apply_report(0, report(model, 9000, "backoff", load_status=500))
        assert not worker.is_pending
        registry.apply_report(0, report(model, 9000, "starting", load_status=500))
        assert not worker.is_pending
        assert not worker.is_ready

    def test_the_last_report_ends_the_leaving(self, registry: Registry) -> None:
        model = add(registry, "m", workers=1)
        worker = model.workers.pop(9000)
        model.leaving[9000] = worker
        registry.apply_report(0, report(model, 9000, "stopped"))
        assert model.leaving == {}

    def test_restarts_are_counted_over_the_lives_of_a_batcher(self, registry: Registry) -> None:
        model = add(registry, "m", workers=1)
        for restarts in (0, 1, 1, 3):
            registry.apply_report(0, report(model, 9000, "ready", restarts=restarts, restart_reason="died"))
        assert model.restarts == {"died": 3}
        registry.batcher_lost(0)
        for restarts in (0, 1):
            registry.apply_report(0, report(model, 9000, "ready", restarts=restarts, restart_reason="timeout"))
        assert model.restarts == {"died": 3, "timeout": 1}

    def test_a_dead_batcher_has_let_go_of_what_was_being_removed(self, registry: Registry) -> None:
        model = add(registry, "m", workers=1)
        registry.begin_removal("m")
        registry.batcher_lost(0)
        assert model.loaded_in == set()


class TestHealth:
    def test_no_model_is_healthy(self, registry: Registry) -> None:
        assert registry.is_healthy(0.0)

    def test_recovering_workers_are_healthy_until_their_time_is_over(self, registry: Registry) -> None:
        model = add(registry, "m", workers=1)
        assert registry.is_healthy(1000.0)
        registry.apply_report(0, report(model, 9000, "backoff", recovering_since=1000.0))
        assert registry.is_healthy(1300.0)
        assert not registry.is_healthy(1300.1)
        registry.apply_report(0, report(model, 9000, "ready", recovering_since=0.0))
        assert registry.is_healthy(1300.1)

    def test_a_worker_that_was_given_up_is_not(self, registry: Registry) -> None:
        model = add(registry, "m", workers=2)
        registry.apply_report(0, report(model, 9001, "failed"))
        assert not registry.is_healthy(0.0)

    def test_only_default_versions_count(self, registry: Registry) -> None:
        add(registry, "m", "1.0", workers=1)
        other = add(registry, "m", "2.0", workers=1)
        registry.apply_report(0, report(other, 9001, "failed"))
        assert registry.is_healthy(0.0)
