"""Metrics in their three modes, from running servers."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import faults
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess

Start = Callable[..., ServerProcess]

HOST = socket.gethostname()
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
#: Records each type of metric, and one that the metrics.yaml of these tests does not list.
REPORTER = """
import os
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

def handle(data, context):
    if data is None:
        return None
    metrics = context.metrics
    for row in data:
        if row["body"] == b"die":
            os._exit(3)
    metrics.add_counter("Rows", len(data), dimensions=[Dimension("Color", "red")])
    metrics.add_size("LastSize", len(data[0]["body"]), unit="B")
    metrics.add_metric("Sizes", 0.02 * len(data[0]["body"]), "MB", metric_type=MetricTypes.HISTOGRAM)
    metrics.add_counter("Unlisted", 1)
    metrics.get_metric("PredictionTime", MetricTypes.GAUGE)
    print("plain output")
    return ["ok"] * len(data)
"""
METRICS_YAML = """
dimensions:
  - &level "Level"
  - &model "ModelName"
ts_metrics:
  counter:
    - {name: Requests2XX, unit: Count, dimensions: [*level, "Hostname"]}
    - {name: ts_inference_requests_total, unit: Count, dimensions: ["hostname", "model_version", "model_name"]}
  gauge:
    - {name: MemoryUsed, unit: MB, dimensions: [*level, "Hostname"]}
model_metrics:
  counter:
    - {name: Rows, unit: count, dimensions: ["Color", *model, *level]}
  gauge:
    - {name: LastSize, unit: bytes, dimensions: [*level, *model]}
    - {name: PredictionTime, unit: ms, dimensions: [*model, *level]}
  histogram:
    - {name: Sizes, unit: MB, dimensions: [*model, *level]}
"""


def scrape(server: ServerProcess, query: str = "") -> Samples:
    """The samples of `/metrics`, by name and labels; the text must be one that Prometheus can read."""
    reply = server.request("metrics", "GET", f"/metrics{query}")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    read = sum(len(family.samples) for family in text_string_to_metric_families(reply.text))
    lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
    assert read == len(lines)
    found: Samples = {}
    for line in lines:
        match = re.fullmatch(r'(\w+)(?:\{((?:\w+="[^"]*",)+)\})? (\S+)', line)
        assert match, line
        found[match[1], tuple(sorted(re.findall(r'(\w+)="([^"]*)",', match[2] or "")))] = float(match[3])
    return found


def value(server: ServerProcess, name: str, **labels: str) -> float | None:
    """One sample, None where it is not there."""
    return scrape(server).get((name, tuple(sorted(labels.items()))))


def names_in(log: str) -> set[str]:
    """The names of the metrics in a metrics log, each line of which must have the form of one."""
    line_form = re.compile(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3} - (\w+)\.\w+:-?\d+\.\d+(E-?\d+)?"
        r"\|#(\w+:[^,|]+(,\w+:[^,|]+)*)\|#hostname:[^,]+(,requestID:[\w,-]+)?,timestamp:\d+"
    )
    found = set()
    for line in log.splitlines():
        match = line_form.fullmatch(line)
        assert match, line
        found.add(match[1])
    return found


SERVER_NAMES = {
    *("Requests2XX", "Requests4XX", "ts_inference_requests_total", "ts_inference_latency_microseconds"),
    *("ts_queue_latency_microseconds", "QueueTime", "WorkerThreadTime", "WorkerLoadTime"),
}
SYSTEM_NAMES = {
    *("CPUUtilization", "MemoryUsed", "MemoryAvailable", "MemoryUtilization"),
    *("DiskUsage", "DiskAvailable", "DiskUtilization"),
}
#: Gauges of ours that have a prefix like TorchServe's.
LOAD_NAMES = {
    *("ts_queue_depth", "ts_running_requests", "ts_queue_wait_seconds"),
    *("ts_worker_busy_ratio", "ts_capacity_rps", "ts_desired_replicas_hint", "ts_kv_cache_usage_ratio"),
}


def is_ours(name: str) -> bool:
    return name.startswith(("wsgi_ts_", "http_server_")) or name in LOAD_NAMES


LEGACY_NAMES = {name for name in SERVER_NAMES if name.startswith("ts_")}


# Prometheus


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server in prometheus mode with two web workers, and the models `echo` and `reporter` with the file above."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "metrics.yaml").write_text(METRICS_YAML)
    archive(folder, "echo")
    archive(folder, "reporter", REPORTER)
    config = {"metrics_mode": "prometheus"}
    with ServerProcess(store=folder, web_workers=2, config=config) as server:
        for model in ("echo", "reporter"):
            assert server.register(f"{model}.mar").status == 200
        yield server


def test_every_metric_of_torchserve_is_there(prometheus: ServerProcess) -> None:
    before = scrape(prometheus)
    host = (("Hostname", HOST), ("Level", "Host"))
    for _ in range(20):
        assert prometheus.predict("echo", b"x").status == 200
    for _ in range(3):
        assert prometheus.predict("echo/1.0", b"x").status == 200
    assert prometheus.predict("nothing", b"x").status == 404
    labels = (("hostname", HOST), ("model_name", "echo"), ("model_version", "default"))
    named = (("hostname", HOST), ("model_name", "echo"), ("model_version", "1.0"))
    ours = (("model_name", "echo"), ("model_version", "1.0"))

    def added(name: str, labels: tuple[tuple[str, str], ...]) -> float:
        return after.get((name, labels), 0) - before.get((name, labels), 0)

    model = (("Hostname", HOST), ("Level", "Model"), ("ModelName", "echo"))

    def all_counted() -> bool:
        """Several processes count, each a moment after the answer."""
        nonlocal after
        after = scrape(prometheus)
        assert added("Requests2XX", host) >= 23 and added("Requests4XX", host) == 1
        assert added("wsgi_ts_batch_size_sum", ours) == 23
        assert added("ts_inference_requests_total", labels) == 20
        assert added("ts_inference_requests_total", named) == 3
        for name in ("request_latency", "queue_wait", "inference"):
            assert added(f"wsgi_ts_{name}_seconds_count", ours) == 23
        for name in ("ts_inference_latency_microseconds", "ts_queue_latency_microseconds"):
            assert added(name, labels) > added(name, named) > 0
        assert after.get(("wsgi_ts_handover_seconds_count", ours), 0) > 0
        return ("PredictionTime", model) in after

    after: Samples = {}
    eventually(all_counted, within=20)
    assert all((name, host) in after for name in ("QueueTime", "WorkerThreadTime", *SYSTEM_NAMES))
    loads = [dict(labels) for name, labels in after if name == "WorkerLoadTime"]
    assert {"WorkerName": "W-9000-echo_1.0", "Level": "Host", "Hostname": HOST} in loads
    assert after["PredictionTime", model] >= 0
    for name in ("request_latency", "queue_wait", "inference"):
        assert after[f"wsgi_ts_{name}_seconds_sum", ours] > 0
    assert (after["wsgi_ts_workers", ours], after["wsgi_ts_workers_ready", ours]) == (1, 1)


def test_the_text_is_torchserves(prometheus: ServerProcess) -> None:
    prometheus.predict("echo", b"x")
    text = prometheus.request("metrics", "GET", "/metrics").text
    assert (
        "# HELP Requests2XX Torchserve prometheus counter metric with unit: Count\n# TYPE Requests2XX counter\n" in text
    )
    assert re.search(r"^Requests2XX\{Level=\"Host\",Hostname=\".*\",\} \d+\.\d+(E\d+)?$", text, re.MULTILINE)
    assert "# TYPE GPUUtilization gauge\n" in text


def test_names_filter_and_any_method_is_answered(prometheus: ServerProcess) -> None:
    query = "/metrics?name[]=Requests2XX&name%5B%5D=QueueTime&name[]=nothing"
    for method in ("GET", "POST", "OPTIONS"):
        text = prometheus.request("metrics", method, query, body=b"" if method == "POST" else None).text
        assert re.findall(r"# TYPE (\w+)", text) == ["Requests2XX", "QueueTime"]
    assert prometheus.request("metrics", "GET", "/metrics/x").status == 404


def test_answers_of_the_other_apis_count(prometheus: ServerProcess) -> None:
    host = {"Level": "Host", "Hostname": HOST}
    prometheus.request("management", "GET", "/models/nothing")
    before = value(prometheus, "Requests4XX", **host) or 0
    assert prometheus.request("management", "GET", "/models/nothing").status == 404
    assert prometheus.request("metrics", "GET", "/nothing").status == 404
    eventually(lambda: value(prometheus, "Requests4XX", **host) == before + 2, within=20)


def test_a_request_that_is_refused_is_counted(prometheus: ServerProcess) -> None:
    labels = {"hostname": HOST, "model_name": "idle", "model_version": "default"}
    assert prometheus.register("echo.mar", model_name="idle", initial_workers=0).status == 200
    assert prometheus.predict("idle", b"x").status == 503
    eventually(lambda: value(prometheus, "ts_inference_requests_total", **labels) == 1, within=20)
    assert prometheus.request("management", "DELETE", "/models/idle").status == 200


@pytest.mark.slow
def test_counts_outlive_the_processes_that_made_them(prometheus: ServerProcess) -> None:
    labels = {"hostname": HOST, "model_name": "echo", "model_version": "default"}
    count = value(prometheus, "ts_inference_requests_total", **labels) or 0
    answers = value(prometheus, "Requests2XX", Level="Host", Hostname=HOST) or 0
    for role in ("model-worker", "web-worker", "batcher"):
        faults.kill(prometheus, role)
    eventually(lambda: prometheus.predict("echo", b"x").status == 200, within=60)
    eventually(lambda: (value(prometheus, "ts_inference_requests_total", **labels) or 0) > count, within=20)
    eventually(lambda: (value(prometheus, "Requests2XX", Level="Host", Hostname=HOST) or 0) > answers, within=20)


def test_what_handlers_report_is_added_up(start_server: Start, store: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.yaml").write_text(METRICS_YAML)
    archive(store, "reporter", REPORTER)
    config = {"metrics_mode": "prometheus", "metrics_config": str(tmp_path / "metrics.yaml")}
    server = start_server(store=store, config=config)
    assert (value(server, "MemoryUsed", Level="Host", Hostname=HOST) or 0) > 0
    server.register("reporter.mar", initial_workers=2)
    model = {"ModelName": "reporter", "Level": "Model", "Hostname": HOST}
    for size in (1, 2, 3, 4):
        assert server.predict("reporter", b"x" * size).status == 200
        # Two workers report, in no order: the next one is asked when what this one says is known.
        eventually(lambda size=size: value(server, "LastSize", **model) == size, within=20)
    eventually(lambda: value(server, "Sizes_count", **model) == 4, within=20)
    assert value(server, "Rows", Color="red", **model) == 4
    buckets = [value(server, "Sizes_bucket", le=le, **model) for le in ("0.01", "0.025", "0.05", "0.075", "+Inf")]
    assert buckets == [0, 1, 2, 3, 4]
    assert value(server, "Sizes_sum", **model) == pytest.approx(0.2)
    asked = {"hostname": HOST, "model_version": "default", "model_name": "reporter"}
    eventually(lambda: value(server, "ts_inference_requests_total", **asked) == 4, within=20)
    # The file's order and units, and nothing that it does not list.
    text = server.request("metrics", "GET", "/metrics").text
    assert f'Rows{{Color="red",ModelName="reporter",Level="Model",Hostname="{HOST}",}} 4.0\n' in text
    assert "# HELP LastSize Torchserve prometheus gauge metric with unit: bytes\n" in text
    assert f'total{{hostname="{HOST}",model_version="default",model_name="reporter",}} 4.0\n' in text
    names = {name for name in re.findall(r"# TYPE (\w+)", text) if not is_ours(name)}
    assert names == {
        *("Requests2XX", "ts_inference_requests_total", "MemoryUsed"),
        *("Rows", "LastSize", "PredictionTime", "Sizes"),
    }
    eventually(lambda: "Unlisted of a handler is dropped" in server.log(), within=20)
    # A dead worker takes nothing along, and its successor adds to what it had reported.
    assert server.predict("reporter", b"die").status == 500
    assert server.predict("reporter", b"x").status == 200
    eventually(lambda: value(server, "Rows", Color="red", **model) == 5, within=20)
    ours = {"model_name": "reporter", "model_version": "1.0"}
    eventually(lambda: value(server, "wsgi_ts_worker_restarts_total", reason="died", **ours) == 1, within=20)
    eventually(lambda: value(server, "wsgi_ts_request_failures_total", reason="worker_died", **ours) == 1, within=20)
    assert names_in(server.log("ts_metrics.log")) == names_in(server.log("model_metrics.log")) == set()


#: In the server's processes: what is not handed over at once is handed over in an hour.
RARELY = """
import wsgi_ts.batcher.template.template as template

template._HAND_OVER_S = 3600.0
"""


def test_what_a_handler_records_is_handed_over_at_once(start_server: Start, store: Path, tmp_path: Path) -> None:
    """So that a scrape that follows a request has it: also the second time, and the third."""
    archive(store, "reporter", REPORTER.replace("return None", "return context.metrics.add_counter('Loads', 1)"))
    (tmp_path / "sitecustomize.py").write_text(RARELY)
    config = {"metrics_mode": "prometheus", "model_metrics_auto_detect": "true"}
    server = start_server(store=store, config=config, environment={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    server.register("reporter.mar")
    model = {"ModelName": "reporter", "Level": "Model", "Hostname": HOST}
    for count in range(1, 6):
        assert server.predict("reporter", b"x").status == 200
        eventually(lambda count=count: value(server, "Rows", Color="red", **model) == count, within=20)


@pytest.mark.slow
def test_unlisted_metrics_are_registered_when_detected(start_server: Start, store: Path) -> None:
    archive(store, "reporter", REPORTER)
    config = {"metrics_mode": "prometheus", "model_metrics_auto_detect": "true", "disable_system_metrics": "true"}
    server = start_server(store=store, config=config)
    server.register("reporter.mar")
    assert server.predict("reporter", b"xx").status == 200
    model = {"ModelName": "reporter", "Level": "Model", "Hostname": HOST}
    eventually(lambda: value(server, "Unlisted", **model) == 1, within=20)
    text = server.request("metrics", "GET", "/metrics").text
    for name, kind, unit in (("Rows", "counter", "Count"), ("Sizes", "histogram", "Megabytes")):
        assert f"# HELP {name} Torchserve prometheus {kind} metric with unit: {unit}\n" in text
    eventually(lambda: "Registering auto detected backend metric" in server.log(), within=20)
    assert not [name for name, _ in scrape(server) if name in SYSTEM_NAMES]


# Logs


def test_metrics_go_to_the_logs(start_server: Start, store: Path) -> None:
    archive(store, "reporter", REPORTER)
    server = start_server(store=store, config={"model_metrics_auto_detect": "true"})
    eventually(lambda: names_in(server.log("ts_metrics.log")) >= SYSTEM_NAMES, within=20)
    server.register("reporter.mar")
    begin = f"ts_inference_requests_total.Count:0.0|#model_name:reporter,model_version:default|#hostname:{HOST}"
    eventually(lambda: begin in server.log("ts_metrics.log"), within=20)
    for _ in range(3):
        assert server.predict("reporter", b"x").status == 200
    assert server.predict("nothing", b"x").status == 404
    eventually(lambda: names_in(server.log("ts_metrics.log")) == SERVER_NAMES | SYSTEM_NAMES, within=15)
    line = rf"ts_inference_requests_total\.Count:(\d\.0)\|#model_name:reporter,model_version:default\|#hostname:{HOST}"
    # Each line has what came since the last one: their sum is the count.
    eventually(lambda: sum(map(float, re.findall(line, server.log("ts_metrics.log")))) == 3, within=20)
    reported = {"PredictionTime", "Rows", "LastSize", "Sizes", "Unlisted"}
    eventually(lambda: names_in(server.log("model_metrics.log")) == reported, within=20)
    row = r"Rows\.Count:1\.0\|#Color:red,ModelName:reporter,Level:Model\|"
    eventually(lambda: len(re.findall(row, server.log("model_metrics.log"))) == 3, within=20)
    backend = server.log("model_metrics.log")
    dimensions = rf"#ModelName:reporter,Level:Model\|#hostname:{HOST},requestID:"
    assert re.search(rf"PredictionTime\.ms:[\d.]+\|{dimensions}", backend)
    assert "Rows" not in server.log("model_log.log")
    eventually(lambda: "plain output" in server.log("model_log.log"), within=20)
    eventually(lambda: "TS_METRICS - Requests2XX.Count:" in server.output(), within=20)
    assert server.request("metrics", "GET", "/metrics").body == b""


@pytest.mark.slow
def test_legacy_mode_shows_three_metrics_and_logs_the_others(start_server: Start, store: Path) -> None:
    archive(store, "echo")
    server = start_server(store=store, config={"metrics_mode": "legacy"}, web_workers=2)
    eventually(lambda: names_in(server.log("ts_metrics.log")) >= SYSTEM_NAMES, within=20)
    server.register("echo.mar")
    assert server.predict("echo", b"x").status == 200
    eventually(lambda: {name for name, _ in scrape(server)} == LEGACY_NAMES, within=20)
    wanted = SYSTEM_NAMES | SERVER_NAMES - LEGACY_NAMES - {"Requests4XX"}
    eventually(lambda: names_in(server.log("ts_metrics.log")) == wanted, within=15)
    eventually(lambda: names_in(server.log("model_metrics.log")) == {"PredictionTime"}, within=20)


@pytest.mark.slow
def test_a_broken_metrics_yaml_is_told_and_nothing_is_recorded(start_server: Start, store: Path) -> None:
    (store / "metrics.yaml").write_text("ts_metrics: {gauge: [{name: MemoryUsed, dimensions: [Level, Hostname]}]}")
    archive(store, "reporter", REPORTER.replace("    metrics.get_metric", "    0 and metrics.get_metric"))
    server = start_server(
        store=store, config={"metrics_mode": "prometheus", "metrics_config": str(store / "metrics.yaml")}
    )
    server.register("reporter.mar")
    assert server.predict("reporter", b"x").status == 200
    assert "ts_metrics: gauge: entry 1 (MemoryUsed): `unit` must be a text that is not empty" in server.log()
    text = server.request("metrics", "GET", "/metrics").text
    assert all(is_ours(name) for name in re.findall(r"# TYPE (\w+)", text))


# The system


COMMAND = """
import sys
pids = sys.stdin.readline()
print("CPUUtilization.Percent:12.5|#Level:Host|#hostname:elsewhere,timestamp:1700000000")
print("GPUUtilization.Percent:%d|#Level:Host,device_id:0|#hostname:elsewhere,1700000000" % pids.count(","))
print("no metric")
print()
print("1:2")
print("some trouble", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_command_measures_in_place_of_the_server(start_server: Start, store: Path, tmp_path: Path) -> None:
    (tmp_path / "measure.py").write_text(COMMAND)
    archive(store, "echo")
    config = {
        "metrics_mode": "prometheus",
        "metric_time_interval": "1",
        "system_metrics_cmd": f"{tmp_path}/measure.py --gpu 0",
    }
    server = start_server(store=store, config=config)
    eventually(lambda: value(server, "CPUUtilization", Level="Host", Hostname="elsewhere") == 12.5, within=20)
    assert not [name for name, _ in scrape(server) if name == "MemoryUsed"]
    server.register("echo.mar", initial_workers=2)
    gpu = {"Level": "Host", "DeviceId": "0", "Hostname": "elsewhere"}
    eventually(lambda: value(server, "GPUUtilization", **gpu) == 1, within=20)
    eventually(lambda: "some trouble" in server.log(), within=20)
    eventually(lambda: 'Failed to parse metrics line of system_metrics_cmd: "no metric".' in server.log(), within=20)


@pytest.mark.slow
def test_torchserves_own_command_runs_and_describe_shows_memory(start_server: Start, store: Path) -> None:
    archive(store, "echo")
    config = {"metrics_mode": "prometheus", "system_metrics_cmd": "ts/metrics/metric_collector.py --gpu 0"}
    server = start_server(store=store, config=config)
    eventually(lambda: {name for name, _ in scrape(server)} >= SYSTEM_NAMES, within=30)
    server.register("echo.mar")
    (worker,) = server.request("management", "GET", "/models/echo").json()[0]["workers"]
    assert worker["memoryUsage"] > 2**20
    assert worker["gpuUsage"] == "N/A"
