"""Metrics without a server: metrics.yaml, the text formats, what is summed, what the board's words mean."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.eventually import eventually
from support.jobs import Jobs

import wsgi_ts.handlers
from wsgi_ts.archive.manifest import parse_manifest
from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.batcher.scheduler.actions import Record
from wsgi_ts.batcher.scheduler.counters import CountersByModel, ModelCounters
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.policy import CloseReason
from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import BatcherWord, ModelWord, WebWord
from wsgi_ts.gpu.assign import place
from wsgi_ts.gpu.devices import gpu_loads
from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.messages import ModelSpec
from wsgi_ts.metrics.exposition import Family, Histogram, Renderer, java_double, server_line
from wsgi_ts.metrics.host import MEASURES
from wsgi_ts.metrics.reported import MAX_METRICS, MAX_SERIES, ModelMetrics, ReportedMetrics, parse_line
from wsgi_ts.metrics.specification import (
    MetricsConfigError,
    MetricsSpecification,
    built_in_specification,
    load_specification,
)
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.metrics import collector
from wsgi_ts.supervisor.metrics.board import BoardMetrics, Values
from wsgi_ts.supervisor.metrics.collector import MetricsCollector
from wsgi_ts.supervisor.metrics.system import SystemMetrics
from wsgi_ts.tracing.records import CLOSE_REASONS

# metrics.yaml


def test_the_built_in_file_has_torchserves_metrics() -> None:
    built_in = built_in_specification()
    assert len(built_in.server) == 19
    assert {name for name, spec in built_in.server.items() if spec.kind == "counter"} == {
        *("Requests2XX", "Requests4XX", "Requests5XX", "ts_inference_requests_total"),
        *("ts_inference_latency_microseconds", "ts_queue_latency_microseconds"),
    }
    assert built_in.server["WorkerLoadTime"].dimensions == ("WorkerName", "Level", "Hostname")
    assert built_in.server["GPUMemoryUsed"].dimensions == ("Level", "DeviceId", "Hostname")
    assert built_in.model.keys() == {"HandlerTime", "PredictionTime"}
    assert built_in.model["PredictionTime"].dimensions == ("ModelName", "Level", "Hostname")


def spec_of(tmp_path: Path, text: str, *, for_prometheus: bool = False) -> MetricsSpecification:
    path = tmp_path / "metrics.yaml"
    path.write_text(text)
    return load_specification(path, for_prometheus=for_prometheus)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "not a YAML file"),
        ("- a", "ts_metrics and model_metrics are missing"),
        ("ts_metrics: [1]", "ts_metrics: must hold counter, gauge and histogram"),
        ("ts_metrics: {rate: []}", "there is no type 'rate'"),
        ("model_metrics: {gauge: {a: 1}}", "model_metrics: gauge: must be a list of metrics"),
        ("model_metrics: {gauge: [a]}", "model_metrics: gauge: entry 1: must have name, unit and dimensions"),
        ("model_metrics: {gauge: [{unit: a, dimensions: [a]}]}", "entry 1: `name` must be a text"),
        ("model_metrics: {gauge: [{name: a, unit: '', dimensions: [a]}]}", r"entry 1 \(a\): `unit` must be a text"),
        ("ts_metrics: {gauge: [{name: a, unit: b, dimensions: []}]}", "`dimensions` must be a list of names"),
        ("model_metrics: {gauge: [{name: a, unit: b, dimensions: c}]}", "`dimensions` must be a list of names"),
        ("model_metrics: {gauge: [{name: a, unit: b, dimensions: [c, c]}]}", "named twice"),
        (
            "model_metrics: {gauge: [{name: a, unit: b, dimensions: [c]}],\n"
            "                counter: [{name: a, unit: b, dimensions: [c]}]}",
            "a is there twice",
        ),
        (
            "ts_metrics: {gauge: [{name: a, unit: b, dimensions: [c]}]}\n"
            "model_metrics: {gauge: [{name: a, unit: b, dimensions: [c]}]}",
            "a stands in ts_metrics and in model_metrics",
        ),
        ("model_metrics: {gauge: [{name: a b, unit: b, dimensions: [c]}]}", "Prometheus allows letters"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(MetricsConfigError, match=rf"metrics\.yaml: .*{reason}"):
        spec_of(tmp_path, text, for_prometheus=True)


def test_a_metric_of_the_server_with_other_dimensions_is_left_out_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "ts_metrics: {gauge: [{name: QueueTime, unit: b, dimensions: [c]}, {name: a, unit: b, dimensions: [c]}]}"
    assert list(spec_of(tmp_path, text).server) == ["a"]
    assert "QueueTime is not recorded: its dimensions are Level, Hostname" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MetricsConfigError, match=r"none\.yaml: No such file"):
        load_specification(tmp_path / "none.yaml")


def test_a_metric_of_handlers_may_have_no_dimensions_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.yaml"
    path.write_text(
        "model_metrics:\n  counter:\n"
        "    - {name: a, unit: count, dimensions: []}\n    - {name: b, unit: count, dimensions: }\n"
    )
    specification = load_specification(path, for_prometheus=True)
    assert [spec.dimensions for spec in specification.model.values()] == [("Hostname",), ("Hostname",)]


def test_dimensions_can_be_reordered_and_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "ts_metrics:\n"
        "  gauge:\n"
        "    - {name: WorkerLoadTime, unit: ms, dimensions: [hostname, WorkerName, Level]}\n"
        "    - {name: CPUUtilization, unit: '%', dimensions: [Place, Machine]}\n"
        "  histogram:\n"
        "    - {name: QueueTime, unit: ms, dimensions: [Level, Hostname]}\n"
    )
    server = spec_of(tmp_path, text).server
    assert server["WorkerLoadTime"].order == (2, 0, 1)
    assert server["CPUUtilization"].order == (0, 1)
    assert server["QueueTime"].kind == "gauge"
    assert "QueueTime: the server records it as a gauge" in caplog.text


# Text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0"),
        (1, "1.0"),
        (1.5, "1.5"),
        (9999999, "9999999.0"),
        (10_000_000, "1.0E7"),
        (15_000_000, "1.5E7"),
        (-12345678.5, "-1.23456785E7"),
        (0.0001, "1.0E-4"),
        (float("inf"), "+Inf"),
        (float("nan"), "NaN"),
    ],
)
def test_java_double(value: float, text: str) -> None:
    assert java_double(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_java_double_keeps_the_value(value: float) -> None:
    assert float(java_double(value)) == value


@given(st.dictionaries(st.tuples(st.text(), st.text()), st.floats(allow_nan=False), max_size=5))
def test_whatever_the_labels_prometheus_can_read_them(samples: dict[tuple[str, ...], float]) -> None:
    family = Family("a", "gauge", "What it is", ("one", "two"), dict(samples))
    (read,) = text_string_to_metric_families(Renderer().render([family]))
    # A carriage return ends a line for Python's parser only.
    if not any("\r" in label for labels in samples for label in labels):
        found = {(sample.labels["one"], sample.labels["two"]): sample.value for sample in read.samples}
        assert found == samples


def test_a_histogram_is_cumulative() -> None:
    family = Family("h", "histogram", "H", ("m",), {("x",): Histogram((0.5, 1.0), (2, 0, 1), 3.5)})
    assert Renderer().render([family]) == (
        "# HELP h H\n# TYPE h histogram\n"
        'h_bucket{m="x",le="0.5",} 2.0\nh_bucket{m="x",le="1.0",} 2.0\nh_bucket{m="x",le="+Inf",} 3.0\n'
        'h_count{m="x",} 3.0\nh_sum{m="x",} 3.5\n'
    )


def test_what_has_changed_is_written_anew_and_what_has_gone_is_left_out() -> None:
    renderer = Renderer()

    def text(**values: float | Histogram) -> str:
        family = Family("m", "gauge", "M", ("of",), {(name,): value for name, value in values.items()})
        return renderer.render([family]).partition("gauge\n")[2]

    assert text(a=1, b=2) == 'm{of="a",} 1.0\nm{of="b",} 2.0\n'
    assert text(a=1, b=3) == 'm{of="a",} 1.0\nm{of="b",} 3.0\n'
    assert text(b=3) == 'm{of="b",} 3.0\n'
    assert text(a=Histogram((1,), (1, 0), 1.0)).count("1.0\n") == 4
    assert text(a=Histogram((1,), (1, 1), 9.0)).count("2.0\n") == 2
    assert Renderer().render([Family("n", "gauge", "N", (), {(): 5})]).endswith("\nn 5.0\n")


def test_a_line_of_the_log() -> None:
    spec = built_in_specification().server["WorkerLoadTime"]
    line = server_line(spec, ("W-9000-m_1.0", "Host", "h"), 5000, 1700000000)
    dimensions = "#WorkerName:W-9000-m_1.0,Level:Host"
    assert line == f"WorkerLoadTime.Milliseconds:5000.0|{dimensions}|#hostname:h,timestamp:1700000000"


# What handlers report


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "PredictionTime.Milliseconds:1.5|#Level:Model,ModelName:m|#type:GAUGE|#hostname:h,17,a,b",
            "PredictionTime.ms:1.5|#ModelName:m,Level:Model|#hostname:h,requestID:a,b,timestamp:17",
        ),
        ("Disk Used.GB:-1e-05|#|#hostname:h,17", "Disk Used.GB:-1.0E-5|#|#hostname:h,timestamp:17"),
        ("Big.unit:1e+16|#a:b:c|#type:odd|#hostname:h,17", "Big.unit:1.0E16|#a:b:c|#hostname:h,timestamp:17"),
    ],
)
def test_a_reported_value_becomes_a_line_of_the_log(line: str, message: str) -> None:
    reported = parse_line(line)
    assert reported is not None
    assert ModelMetrics.load(None, "log", True).record(reported) == message


@pytest.mark.parametrize(
    "line", ["", "Time.ms:fast|#Level:Model|#hostname:h,17", "Time.ms:1,5|#|#hostname:h,17", "Time.ms:1|#Level:Model"]
)
def test_what_is_no_metric_is_not_read_as_one(line: str) -> None:
    assert parse_line(line) is None


def report(metrics: ModelMetrics, name: str, value: float, kind: str = "COUNTER", **dimensions: str) -> None:
    text = ",".join(f"{key}:{word}" for key, word in dimensions.items())
    reported = parse_line(f"{name}.unit:{value}|#{text}|#type:{kind}|#hostname:h,17")
    assert reported is not None
    assert metrics.record(reported) is None


def test_updates_add_up_to_the_sums_of_all_templates() -> None:
    templates = [ModelMetrics.load(None, "prometheus", True) for _ in range(2)]
    kept = ReportedMetrics(built_in_specification())
    for template in (*templates, templates[0]):
        report(template, "c", 2, a="x")
        report(template, "c", 1, a="y")
        report(template, "g", 7, "GAUGE", a="x")
        report(template, "hist", 0.02, "HISTOGRAM", a="x")
        report(template, "hist", 20, "HISTOGRAM", a="x")
        kept.apply(json.loads(json.dumps(template.take_updates())))
        assert not template.has_updates
    families = {family.name: family for family in kept.families()}
    assert families["c"].samples == {("x", "h"): 6, ("y", "h"): 3}
    assert families["g"].samples == {("x", "h"): 7}
    histogram = families["hist"].samples["x", "h"]
    assert isinstance(histogram, Histogram)
    assert (histogram.counts[2], histogram.counts[-1], sum(histogram.counts)) == (3, 3, 6)
    assert histogram.total == pytest.approx(60.06)
    assert families["HandlerTime"].samples == {}


def test_times_of_phases_are_recorded_whether_listed_or_not(caplog: pytest.LogCaptureFixture) -> None:
    """A model's YAML has asked for them."""
    metrics = ModelMetrics.load(None, "prometheus", False)
    report(metrics, "ts_handler_inference", 2.5, "GAUGE", ModelName="m", Level="Model")
    ((name, kind, _, dimensions, series),) = metrics.take_updates()
    assert (name, kind, dimensions) == ("ts_handler_inference", "gauge", ("ModelName", "Level", "Hostname"))
    assert [numbers for _, numbers in series] == [[2.5]]
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_a_dimension_with_endless_values_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    metrics = ModelMetrics.load(None, "prometheus", True)
    for number in range(MAX_SERIES + 5):
        report(metrics, "c", 1, request=str(number))
    (update,) = metrics.take_updates()
    assert len(update[4]) == MAX_SERIES
    assert caplog.text.count("more than 1000 different sets") == 1


def test_what_does_not_fit_is_dropped_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    strict, lax = (ModelMetrics.load(None, "prometheus", detect) for detect in (False, True))
    for _ in range(2):
        report(strict, "c", 1, a="x")
        report(strict, "HandlerTime", 1, "GAUGE", ModelName="m")
        report(lax, "Requests2XX", 1, Level="Model")
        report(lax, "wsgi_ts_workers", 1, Level="Model")
        report(lax, "spaced name", 1, Level="Model")
    assert not strict.has_updates
    assert not lax.has_updates
    assert len(caplog.records) == 5
    for text in ("does not list it", "without the dimension 'Level'", "the name is taken", "does not allow its name"):
        assert text in caplog.text
    kept = ReportedMetrics(None)
    kept.apply([["c", "counter", "u", ["a", "Hostname"], [[["x", "h"], [1]]]]])
    kept.apply([["c", "gauge", "u", ["a", "Hostname"], [[["x", "h"], [5]]]]])
    assert kept.families()[0].samples == {("x", "h"): 1}


def test_names_without_end_are_dropped_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    kept = ReportedMetrics(None)
    kept.apply([[f"m{number}", "gauge", "u", ["Hostname"], [[["h"], [1]]]] for number in range(MAX_METRICS + 5)])
    assert len(kept.families()) == MAX_METRICS
    kept.apply([["m0", "gauge", "u", ["Hostname"], [[["h"], [7]]]]])
    assert kept.families()[0].samples == {("h",): 7}
    assert caplog.text.count("further ones are dropped") == 1
    reader = ModelMetrics.load(None, "prometheus", True)
    for number in range(MAX_METRICS + 5):
        report(reader, f"m{number}", 1, Level="Model")
    assert caplog.text.count("further ones are dropped") == 2


# The board


@pytest.fixture
def board() -> Iterator[Board]:
    prefix = f"wsgi-ts-test-{os.getpid()}"
    made = Board.create(prefix, 3)
    yield made
    made.close()
    Board.unlink(prefix)


def server_values(board: Board, model: ModelVersion) -> dict[str, Values]:
    """What TorchServe's metrics of the server are, on a board of two batchers."""
    metrics = BoardMetrics(board, 2, "h")
    return metrics.server_values(metrics.read([model]))


def test_the_words_of_all_processes_are_summed(board: Board) -> None:
    words = board.words
    for row, count in ((board.web_row(0), 3), (board.web_row(1), 20), (board.control_web_row, 100)):
        words[row + WebWord.RESPONSES_2XX] = count
    for batcher, count in ((0, 2), (1, 5), (2, 1000)):
        words[board.model_row(batcher, 4) + ModelWord.REQUESTS] = count
        words[board.model_row(batcher, 4) + ModelWord.REQUESTS_NAMED] = 1
    words[board.batcher_row(1) + BatcherWord.LAST_BATCH_NS] = 5
    words[board.batcher_row(1) + BatcherWord.LAST_QUEUE_US] = 1500
    directory = ModelDirectory(Path("/m"), parse_manifest({"model": {"modelName": "m", "handler": "h"}}), "m.mar", True)
    model = ModelVersion(ModelSpec(4, "m", "1.0", "/m", "h", None), directory, None, place(0))
    values = server_values(board, model)
    assert values["Requests2XX"] == {("Host", "h"): 123}
    assert values["Requests5XX"] == {}
    assert values["ts_inference_requests_total"] == {("m", "default", "h"): 7, ("m", "1.0", "h"): 2}
    assert values["QueueTime"] == {("Host", "h"): 1.5}
    board.clear_model(4)
    assert server_values(board, model)["ts_inference_requests_total"] == {}


def test_requests_to_functions_count_in_rows_of_their_own(board: Board) -> None:
    """All as their host's, each as its function's, and none where a damaged slot says that there is one."""
    counters = CountersByModel(board, 0)
    segment, rows = Jobs().segment, (6, 7, 6, layout.MAX_MODELS + 1)
    jobs = [Job(segment, number, 1, number * 1000, number == 2, 0.0, row=row) for number, row in enumerate(rows)]
    counters.arrived(4, jobs)
    counters.dispatched(4, jobs, 0.001, CloseReason.DELAY)
    counters.record(Record(4, jobs, 0.002, 0.001), 0.002)
    before = {"function": "f", "model": "w__f", "row": 5}
    functions = {"f": before, "g": {"function": "g", "model": "w__g", "row": 6}}
    directory = ModelDirectory(Path("/m"), parse_manifest({"model": {"modelName": "m", "handler": "h"}}), "m.mar", True)
    spec = ModelSpec(4, "w__functions", "1.0", "/m", "h", None, functions=functions)
    host = ModelVersion(spec, directory, None, place(0))
    board.words[board.refusals(3) + 6] = 5
    values = server_values(board, host)
    f, named, g = ("w__f", "default", "h"), ("w__f", "1.0", "h"), ("w__g", "default", "h")
    assert values["ts_inference_requests_total"] == {f: 1, named: 1, g: 1 + 5}
    assert values["ts_queue_latency_microseconds"] == {f: 1000, named: 998, g: 999}
    assert values["ts_inference_latency_microseconds"] == {f: 2000, named: 1998, g: 1999}
    (counted,) = BoardMetrics(board, 2, "h").read([host])
    assert counted.words[ModelWord.REQUESTS] + counted.words[ModelWord.REQUESTS_NAMED] == len(jobs)


@given(st.lists(st.tuples(st.integers(0, 20_000_000), st.booleans()), min_size=1, max_size=600))
def test_counters_of_a_batch(waits: list[tuple[int, bool]]) -> None:
    """Each request is in one bucket, and the sums are those of the requests, however a batch is mixed."""
    words = memoryview(bytearray(layout.MODEL_WORDS * layout.WORD)).cast("Q")
    counters = ModelCounters(words, 0)
    now_us = 10**9
    segment = Jobs().segment
    jobs = [Job(segment, 0, 1, (now_us - wait_us) * 1000, is_named, 0.0) for wait_us, is_named in waits]
    counters.dispatched(jobs, now_us / 1e6, CloseReason.DELAY)
    counters.arrived(jobs)
    counters.begun(300)
    counters.answered(jobs, now_us / 1e6, 0.002)
    for first in (ModelWord.QUEUE_BUCKETS, ModelWord.LATENCY_BUCKETS):
        expected = [0] * (len(layout.TIME_BUCKETS_US) + 1)
        for wait_us, _ in waits:
            expected[sum(bound < wait_us for bound in layout.TIME_BUCKETS_US)] += 1
        assert list(words[first : first + len(expected)]) == expected
    for word, wanted in ((ModelWord.QUEUE_US, False), (ModelWord.QUEUE_US_NAMED, True)):
        assert words[word] == sum(wait_us for wait_us, is_named in waits if is_named == wanted)
    sizes = len(layout.BATCH_SIZES) + 1
    counted = {
        word: list(words[word : word + sizes])
        for word in (ModelWord.BATCH_BUCKETS, ModelWord.SERVICE_BY_SIZE, ModelWord.REQUESTS_BY_SIZE)
    }
    place = sum(size < len(waits) for size in layout.BATCH_SIZES)
    for word, total in zip(counted, (1, 2000, len(waits)), strict=True):
        assert counted[word] == [total if number == place else 0 for number in range(sizes)]
    assert words[ModelWord.BATCHES] == 1
    closed = ModelWord.CLOSED
    assert words[closed + CloseReason.DELAY] == sum(words[closed : closed + len(CLOSE_REASONS)]) == 1
    named = sum(is_named for _, is_named in waits)
    assert (words[ModelWord.REQUESTS], words[ModelWord.REQUESTS_NAMED]) == (len(waits) - named, named)
    assert words[ModelWord.HANDOVER_US] == 300


def test_histograms_do_not_overlap() -> None:
    firsts = sorted(value for name, value in vars(ModelWord).items() if name.endswith("_BUCKETS"))
    sizes = [len(layout.TIME_BUCKETS_US) + 1] * 4 + [len(layout.BATCH_SIZES) + 1]
    ends = [first + size for first, size in zip(firsts, sizes, strict=True)]
    assert all(end <= first for end, first in zip(ends, firsts[1:], strict=False))
    assert ends[-1] <= ModelWord.OLDEST_NS
    assert ModelWord.CLOSED + len(CLOSE_REASONS) <= ModelWord.SERVICE_BY_SIZE


# The system


def test_a_command_that_cannot_be_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "fail.py").write_text("import sys; sys.exit(3)")
    system = SystemMetrics(
        interval_s=60.0,
        gpus=0,
        hostname="h",
        command="fail.py",
        home=tmp_path,
        worker_pids=lambda: [],
        publish=lambda values: None,
    )
    assert system._ask_command() == {}
    assert "system_metrics_cmd fail.py ended with exit code 3" in caplog.text


def test_the_system_is_measured_before_anybody_can_ask() -> None:
    found: list[dict[str, object]] = []
    system = SystemMetrics(
        interval_s=60.0,
        gpus=0,
        hostname="h",
        command="",
        home=None,
        worker_pids=lambda: [],
        publish=found.append,
    )
    system.start()
    system.stop()
    (values,) = found
    assert values.keys() >= {"CPUUtilization", "MemoryUsed", "DiskUsage"}


def test_a_system_that_cannot_be_measured_does_not_stop_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> float:
        raise OSError("no /proc")

    monkeypatch.setitem(MEASURES, "MemoryUsed", fail)
    system = SystemMetrics(
        interval_s=60.0,
        gpus=0,
        hostname="h",
        command="",
        home=None,
        worker_pids=lambda: [],
        publish=lambda values: None,
    )
    system.start()
    system.stop()
    assert "The system metrics cannot be measured; tried again in 60 s" in caplog.text


# The collector


@pytest.fixture
def bell(board: Board) -> Iterator[Doorbell]:
    """The bell of the only batcher."""
    name = batcher_bell_name(board.prefix, 0)
    Doorbell.create(name)
    bell = board.batcher_bell(0)
    yield bell
    bell.close()
    Doorbell.unlink(name)


class Log:
    """ts_metrics.log in memory."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ts_metrics = self

    def write(self, lines: list[str], thread: str) -> None:
        self.lines += lines

    def has(self, name: str) -> bool:
        return any(line.startswith(f"{name}.") for line in self.lines)


def collector_of(board: Board, log: Log, mode: str) -> MetricsCollector:
    config = Config(metrics_mode=mode, disable_system_metrics=True)
    return MetricsCollector(config, board, Registry(Numbers(9000)), cast(LogFiles, log), 0)


@pytest.mark.parametrize("mode", ["log", "legacy"])
def test_the_first_changes_are_logged_at_once(
    board: Board, bell: Doorbell, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(collector, "LOG_INTERVAL_S", 60.0)
    log = Log()
    with collector_of(board, log, mode).running():
        board.words[board.web_row(0) + WebWord.RESPONSES_2XX] = 1
        eventually(lambda: log.has("Requests2XX"), within=20)
    assert not log.has("Requests4XX")


def test_a_worker_that_was_loaded_is_logged_at_once(
    board: Board, bell: Doorbell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "LOG_INTERVAL_S", 60.0)
    monkeypatch.setattr(collector, "_LOOK_S", 60.0)
    log = Log()
    metrics = collector_of(board, log, "log")
    monkeypatch.setattr(metrics, "_load_times", lambda: {("W-9000-m_1.0", "Host", "h"): 5})
    with metrics.running():
        metrics.worker_changed()
        eventually(lambda: log.has("WorkerLoadTime"), within=20)


def test_a_sleeping_batcher_counts_before_its_counts_are_read(
    board: Board, bell: Doorbell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "_SETTLE_LIMIT_S", 60.0)
    words, row = board.words, board.batcher_row(0)

    def batcher() -> None:
        bell.sleep(60.0)
        bell.wake_up()
        time.sleep(0.2)  # others have the cores
        words[row + BatcherWord.LAST_QUEUE_US] = 2000
        words[row + BatcherWord.LAST_BATCH_NS] = 1
        for _ in range(2):
            bell.fall_asleep()
            words[row + BatcherWord.SLEEPS] += 1
            bell.sleep(1.0)

    words[row + BatcherWord.HEARTBEAT_NS] = 1
    words[row + BatcherWord.SLEEPS] = 1
    bell.fall_asleep()
    thread = threading.Thread(target=batcher)
    thread.start()
    text = collector_of(board, Log(), "prometheus").text(["QueueTime"])
    thread.join()
    assert re.search(r'QueueTime{Level="Host",Hostname=".+",} 2.0', text)


def test_a_batcher_that_never_sleeps_holds_up_no_reader(board: Board, bell: Doorbell) -> None:
    board.words[board.batcher_row(0) + BatcherWord.HEARTBEAT_NS] = 1
    assert "QueueTime" in collector_of(board, Log(), "prometheus").text()


def test_gpus_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$1" in *index*) echo 0; echo 1;; *) echo "37 %, 2048 MiB, 8192 MiB";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    load = {"GPUMemoryUtilization": 25.0, "GPUMemoryUsed": 2048.0, "GPUUtilization": 37.0}
    assert gpu_loads(2) == [load, load]
    assert gpu_loads(0) == []
    tool.write_text('#!/bin/sh\ncase "$1" in *index*) echo 0;; *) echo "[N/A], 1 MiB, 2 MiB";; esac\n')
    assert gpu_loads(1) == []


def test_ts_collects_memory_of_processes() -> None:
    shim = Path(wsgi_ts.__path__[0]) / "ts_shim"
    program = (
        "import io, os; from ts.metrics import process_memory_metric, system_metrics\n"
        "system_metrics.collect_all(system_metrics, 0)\n"
        "assert len(system_metrics.system_metrics) == 7\n"
        "process_memory_metric.check_process_mem_usage(io.StringIO(f'{os.getpid()},x\\n'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(shim), str(Path(__file__).parents[3])])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=300
    )
    *lines, memory = done.stdout.splitlines()
    assert [parse_line(line) is not None for line in lines] == [True] * 7
    assert int(memory.partition(":")[2]) > 2**20
