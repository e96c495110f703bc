"""What the console is told: sums over the batchers, drawings of workflows, settings without their secrets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.archive.manifest import parse_manifest
from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import ModelWord, WebWord, WorkflowWord
from wsgi_ts.gpu import devices
from wsgi_ts.gpu.assign import place
from wsgi_ts.messages import ModelSpec, WorkerReport, WorkerState
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion, WorkerRecord
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor import console_models
from wsgi_ts.supervisor.console import HIDDEN, ConsoleData, drawing


@pytest.fixture
def board() -> Iterator[Board]:
    prefix = f"wsgi-ts-test-{os.getpid()}"
    made = Board.create(prefix, 2)
    yield made
    made.close()
    Board.unlink(prefix)


def status() -> dict[str, Any]:
    processes = [{"role": "supervisor", "pid": os.getpid()}, {"role": "batcher 0", "pid": -1}]
    return {"version": "1", "processes": processes}


def console(board: Board, registry: Registry, config: Config | None = None) -> ConsoleData:
    return ConsoleData(config or Config(), board, registry, 2, status)


def snapshot(data: ConsoleData, since: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data.snapshot(since=since).partition(" ")[2])
    return found


def revision_of(data: ConsoleData, since: int = 0) -> int:
    return int(data.snapshot(since=since).partition(" ")[0])


def registry_with(board: Board, *reports: WorkerReport) -> Registry:
    registry = Registry(Numbers(9000, board.clear_model), board.clear_workflow)
    directory = ModelDirectory(Path("/m"), parse_manifest({"model": {"modelName": "m", "handler": "h"}}), "m.mar", True)
    model = ModelVersion(ModelSpec(4, "m", "1.0", "/m", "h", None), directory, None, place(0), loaded_in={0, 1})
    for report in reports:
        model.workers[report.worker_id] = WorkerRecord(report.worker_id, 0, None, 1000, report=report)
    registry.add(model)
    return registry


def test_what_batchers_have_counted_is_summed(board: Board) -> None:
    registry = registry_with(board)
    for batcher, count in ((0, 3), (1, 40)):
        row = board.model_row(batcher, 4)
        board.words[row + ModelWord.REQUESTS] = count
        board.words[row + ModelWord.REQUESTS_NAMED] = 100
        board.words[row + ModelWord.BATCHES] = count
        board.words[row + ModelWord.BATCH_BUCKETS + 2] = count
        board.words[row + ModelWord.SERVICE_BY_SIZE + 2] = 1000 * count
        # What each of them has learnt; the one that has done more is believed.
        board.words[row + ModelWord.FIXED_NS] = 5_000_000 * (batcher + 1)
        board.words[row + ModelWord.PER_REQUEST_NS] = 250_000
    board.words[board.web_row(3) + WebWord.RESPONSES_5XX] = 7
    board.words[board.control_web_row + WebWord.RESPONSES_5XX] = 2
    data = snapshot(console(board, registry))
    (model,) = data["models"]
    assert (model["requests"], model["batches"], model["default"]) == (243, 43, True)
    assert model["batch"] == [0, 0, 43, 0, 0, 0, 0, 0, 0, 0, 0]
    assert model["service_by_size_us"][2] == 43_000
    assert model["curve"] == {"a_ms": 10.0, "b_ms": 0.25}
    assert data["answers"] == {"2xx": 0, "4xx": 0, "5xx": 9}
    assert data["gpus"] == []
    own, batcher = data["server"]["processes"]
    assert own["memory"] > 1_000_000
    assert batcher["memory"] == 0


def test_a_rule_that_learns_nothing_has_no_curve(board: Board) -> None:
    registry = registry_with(board)
    board.words[board.model_row(0, 4) + ModelWord.BATCHES] = 5
    (model,) = snapshot(console(board, registry))["models"]
    assert model["curve"] is None


def test_how_a_worker_has_ended_is_told_of_the_next_one_too(board: Board) -> None:
    died = WorkerReport(9000, 4, WorkerState.READY, os.getpid(), exit_reason="signal SIGSEGV", last_lines=["a", "b"])
    waits = WorkerReport(9001, 4, WorkerState.BACKOFF, -1, restarts=4, exit_reason="exit code 1")
    (model,) = snapshot(console(board, registry_with(board, died, waits)))["models"]
    first, second = model["workers"]
    assert (first["state"], first["last_end"], first["last_lines"]) == ("ready", "signal SIGSEGV", ["a", "b"])
    assert first["memory"] > 1_000_000
    assert (second["state"], second["memory"], second["restarts"]) == ("backoff", 0, 4)


def node(name: str, *parents: int) -> dict[str, Any]:
    rest = {"model": name, "version": None, "is_function": False, "when": "", "on_error": "fail", "timeout_ms": 1}
    return {"name": name, "parents": list(parents), "scatters": False, "gathers": False, **rest}


def test_nodes_are_drawn_behind_their_parents_in_whatever_order_they_stand() -> None:
    made = drawing([node("join", 1, 2), node("b", 3), node("a", 3), node("first")])
    columns = {each["name"]: each["column"] for each in made["nodes"]}
    assert columns == {"first": 0, "a": 1, "b": 1, "join": 2}
    assert {(edge["from"], edge["to"]) for edge in made["edges"]} == {
        ("first", "a"),
        ("first", "b"),
        ("a", "join"),
        ("b", "join"),
    }
    assert len({(each["column"], each["row"]) for each in made["nodes"]}) == 4


def test_a_workflow_has_the_counts_of_all_processes(board: Board) -> None:
    registry = registry_with(board)
    registry.workflows.set("w", "w", {"nodes": [node("first"), node("second", 0)]}, {})
    index = registry.workflows.graphs()["w"]["index"]
    for segment in (0, 5):
        row = board.workflow_row(segment, index)
        board.words[row + WorkflowWord.CODES] = 10
        board.words[row + WorkflowWord.NODES + 2] = 4
        board.words[row + WorkflowWord.NODES + 3] = 8000
    (workflow,) = snapshot(console(board, registry))["workflows"]
    assert workflow["codes"]["200"] == 20
    assert workflow["nodes"][1] == {"name": "second", "runs": 8, "took_us": 16000}


def test_settings_have_sources_and_no_secrets(board: Board) -> None:
    config = Config(keystore_pass="tops3cret", web_workers=3, origins={"web_workers": "config.properties:3"})
    found = console(board, registry_with(board), config).settings()
    rows = {row["key"]: row for row in found["settings"]}
    assert rows["keystore_pass"]["value"] == HIDDEN
    assert (rows["web_workers"]["value"], rows["web_workers"]["default"]) == ("3", "2")
    assert rows["web_workers"]["source"] == "config.properties:3"
    assert rows["allowed_urls"]["value"] == "file://.*, http(s)?://.*"
    assert "tops3cret" not in json.dumps(found)
    assert {"open files", "cores", "Python"} <= {finding["subject"] for finding in found["findings"]}


def test_gpus_are_read_from_one_call_of_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in *query-gpu=index*) printf "0\\n1\\n" ;;\n'
        '*) printf "NVIDIA H100, 80GB, 37 %%, 1024 MiB, 81559 MiB, 41, 96.50 W, 700.00 W\\n'
        'Other, [N/A], 0 MiB, 16000 MiB, [N/A], [N/A], [N/A]\\n" ;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first, second = devices.gpu_details(2, {})
    assert first == {
        "gpu": 0,
        "name": "NVIDIA H100, 80GB",
        "utilization": 37.0,
        "memory_used_mib": 1024.0,
        "memory_total_mib": 81559.0,
        "temperature_c": 41.0,
        "power_w": 96.5,
        "power_limit_w": 700.0,
    }
    assert (second["utilization"], second["memory_total_mib"]) == (None, 16000.0)
    assert devices.gpu_details(0, {}) == []


def models_of(data: ConsoleData) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = snapshot(data)["models"]
    return found


def test_only_what_has_changed_is_made_anew(board: Board) -> None:
    reports = [WorkerReport(9000 + number, 4, WorkerState.READY, -1) for number in range(3)]
    registry = registry_with(board, *reports)
    data = console(board, registry)
    first = models_of(data)
    assert data.models.made == 1 + 3
    assert models_of(data) == first
    assert data.models.made == 4
    # A number of the version: its own text, and none of its workers.
    board.words[board.model_row(1, 4) + ModelWord.REQUESTS] = 5
    assert [each["requests"] for each in models_of(data)] == [5]
    assert data.models.made == 5
    # A worker: its text, and that of the version.
    model = registry.get("m", None)
    model.workers[9001].report = WorkerReport(9001, 4, WorkerState.BACKOFF, -1, exit_reason="exit code 1")
    assert [each["state"] for each in models_of(data)[0]["workers"]] == ["ready", "backoff", "ready"]
    assert data.models.made == 7
    # One that leaves is no new one, but shown otherwise.
    model.leaving[9000] = model.workers.pop(9000)
    assert [(each["id"], each["leaving"]) for each in models_of(data)[0]["workers"]] == [
        (9001, False),
        (9002, False),
        (9000, True),
    ]
    del model.leaving[9000]
    assert [each["id"] for each in models_of(data)[0]["workers"]] == [9001, 9002]
    model.min_workers = 7
    assert models_of(data)[0]["min_workers"] == 7
    # What is kept is what a console says that has never been asked before.
    assert models_of(data) == models_of(console(board, registry))


def test_only_what_has_changed_since_a_revision_is_told(board: Board) -> None:
    registry = registry_with(board)
    second = registry.get("m", None)
    directory = second.directory
    registry.add(ModelVersion(ModelSpec(5, "n", "1.0", "/n", "h", None), directory, None, place(0), loaded_in={0}))
    data = console(board, registry)

    def told(since: int) -> tuple[list[int], dict[int, dict[str, Any]]]:
        found = snapshot(data, since)
        assert len(set(found["order"])) == len(found["order"])
        models = {model["id"]: model for model in found["models"]}
        assert set(models) <= set(found["order"])
        return found["order"], models

    first = revision_of(data)
    order, whole = told(0)
    assert [whole[number]["name"] for number in order] == ["m", "n"]
    assert told(first) == (order, {})
    # Where only numbers have changed nothing else is told, and to whom has missed that it is told again.
    board.words[board.model_row(0, 5) + ModelWord.REQUESTS] = 5
    counted = revision_of(data, first)
    _, numbers = told(first)
    assert list(numbers) == [order[1]]
    assert not numbers[order[1]].keys() & {"name", "workers", "default"}
    assert whole[order[1]] | numbers[order[1]] == told(0)[1][order[1]]
    assert told(counted) == (order, {})
    # Else the whole version is, also to those who know what it has counted.
    registry.get("n", None).min_workers = 3
    assert told(counted) == (order, {order[1]: told(0)[1][order[1]]})
    changed = revision_of(data)
    registry.remove(second)
    assert told(changed) == (order[1:], {})
    # A revision of the supervisor before this one is as good as none.
    assert told(1) == told(0)
    assert told(1)[1][order[1]]["name"] == "n"


def test_the_memory_of_many_processes_is_read_of_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    now = 1000.0
    factors: dict[int, int] = {}
    monkeypatch.setattr(console_models, "resident_bytes", lambda pid: read.append(pid) or pid * factors.get(pid, 10))
    monkeypatch.setattr(console_models.time, "monotonic", lambda: now)
    memory = console_models.Memory()
    pids = range(1, 2 * console_models.MOST_READ + 1)

    def look() -> tuple[list[int], set[int]]:
        changed = memory.refresh()
        assert [memory.of(pid) for pid in pids if factors.get(pid)] == [pid * 10 for pid in pids if factors.get(pid)]
        taken, read[:] = list(read), []
        return taken, changed

    factors.update(dict.fromkeys(pids, 10))
    assert look() == (list(pids), set())  # of those that are new there is nothing to show otherwise
    now += console_models.MEMORY_INTERVAL_S - 1
    assert look() == ([], set())
    now += 1
    (first, changed), (second, changed_later) = look(), look()
    assert first + second == list(pids)
    assert len(first) == console_models.MOST_READ
    assert (changed, changed_later) == (set(), set())
    assert look() == ([], set())
    # One that has ended is forgotten, and told of as one that has changed.
    now += console_models.MEMORY_INTERVAL_S
    factors[2] = 0
    assert look() == (first, {2})
    assert look() == (second, set())
    now += console_models.MEMORY_INTERVAL_S
    assert look()[0] == [pid for pid in first if pid != 2] + second[:1]


def test_a_worker_that_has_taken_memory_is_told_of_again(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_models, "MEMORY_INTERVAL_S", 0.0)
    sizes = {os.getpid(): 1000, 7: 2000, 8: 3000}
    monkeypatch.setattr(console_models, "resident_bytes", lambda pid: sizes.get(pid, 0))
    reports = [WorkerReport(9000 + place, 4, WorkerState.READY, pid) for place, pid in enumerate((7, 8))]
    data = console(board, registry_with(board, *reports))
    revision = revision_of(data)
    assert snapshot(data, revision)["models"] == []
    sizes[8] = 3001
    (model,) = snapshot(data, revision)["models"]
    assert [worker["memory"] for worker in model["workers"]] == [2000, 3001]
