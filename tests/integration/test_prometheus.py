"""A real Prometheus reads a real server: every query of the shipped dashboard and rules finds data there."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support import debian, http
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess, free_ports
from support.wars import war

debian.needs("prometheus")
debian.needs("promtool")

RULES = REPOSITORY / "deploy" / "prometheus" / "rules.yaml"
DASHBOARD = REPOSITORY / "deploy" / "grafana" / "wsgi-ts.json"
JOB = "wsgi-ts"
#: Does what the body says.
OBEDIENT = """
import os, time

def handle(data, context):
    for place, row in enumerate(data or []):
        wish = bytes(row["body"])
        if wish == b"fail":
            raise ValueError("as you wish")
        if wish == b"die":
            os._exit(3)
        if wish == b"refuse":
            context.set_response_status(422, idx=place)
        if wish.startswith(b"sleep"):
            time.sleep(float(wish[5:]))
        ends_at = time.monotonic() + 100
        while wish.startswith(b"wait:") and not os.path.exists(wish[5:]) and time.monotonic() < ends_at:
            time.sleep(0.005)
    return data and ["done"] * len(data)
"""
WORKFLOW = """
models:
  retry-attempts: 2
  timeout-ms: 300
  node: {url: obedient.mar}
dag:
  node: []
"""
#: What a machine with a GPU says of itself.
MEASURE = """
import sys
sys.stdin.readline()
for name in ("CPUUtilization", "MemoryUtilization", "DiskUtilization"):
    print(f"{name}.Percent:12.5|#Level:Host|#hostname:here,timestamp:1700000000")
for name in ("GPUUtilization", "GPUMemoryUtilization"):
    print(f"{name}.Percent:40|#Level:Host,DeviceId:0|#hostname:here,timestamp:1700000000")
"""
FAILING_PLUGIN = """
from wsgi_ts.plugins import plugin

@plugin("metrics", name="sink")
class Sink:
    interval_s = 0.2
    def emit(self, samples):
        raise ConnectionError("nobody takes them")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store, places = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("places")
    archive(store, "obedient", OBEDIENT, config_yaml="jobQueueSize: 2\nmaxBatchDelay: 1\nbatchSize: 1\n")
    archive(store, "hasty", OBEDIENT, config_yaml="clientTimeoutInMills: 200\n")
    archive(store, "killed", OBEDIENT, config_yaml="responseTimeout: 1\n")
    archive(store, "fragile", OBEDIENT)
    war(store, "flow", WORKFLOW)
    (places / "measure.py").write_text(MEASURE)
    (places / "plugins").mkdir()
    (places / "plugins" / "failing.py").write_text(FAILING_PLUGIN)
    config = {
        "metrics_mode": "prometheus",
        "metric_time_interval": "1",
        "system_metrics_cmd": os.fspath(places / "measure.py"),
        "plugins_path": os.fspath(places / "plugins"),
    }
    with ServerProcess(store=store, web_workers=2, config=config) as running:
        for name in ("obedient", "hasty", "killed", "fragile"):
            assert running.register(f"{name}.mar").status == 200
        assert running.request("management", "POST", "/workflows?url=flow.war", body=b"", timeout=60).status == 200
        yield running


def samples(server: ServerProcess, name: str, **labels: str) -> dict[str, float]:
    """The values of a metric by reason, of the samples that have these labels."""
    text = server.request("metrics", "GET", "/metrics").text
    return {
        sample.labels.get("reason", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def running(server: ServerProcess, model: str) -> float:
    """How many requests its workers have."""
    return samples(server, "ts_running_requests", model_name=model)[""]


def waiting(server: ServerProcess, model: str) -> int:
    """How many requests are in its queue."""
    (described,) = server.request("management", "GET", f"/models/{model}").json()
    return int(described["jobQueueStatus"]["pendingRequests"])


def send(connection: http.RawConnection, model: str, wish: str) -> None:
    """Asks for something on a connection."""
    head = f"POST /predictions/{model} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(wish)}\r\n\r\n"
    connection.send((head + wish).encode())


def hang_up(server: ServerProcess, model: str, gate: Path) -> None:
    """Asks for something and leaves while the handler is at it; the handler ends when the server has noticed that."""
    with server.raw() as connection:
        send(connection, model, f"wait:{gate}")
        eventually(lambda: running(server, model) == 1, within=20)

    def is_noticed() -> bool:
        traces = json.loads(server.request("management", "GET", f"/debug/traces?model={model}").body)["traces"]
        return any(each["status"] == 499 for each in traces)

    eventually(is_noticed, within=20)
    gate.touch()
    eventually(lambda: running(server, model) == 0, within=20)


# What the counters say


def test_each_failure_has_its_reason(server: ServerProcess, tmp_path: Path) -> None:
    def failed(model: str) -> dict[str, float]:
        return samples(server, "wsgi_ts_request_failures_total", model_name=model)

    for wish, status in (("fine", 200), ("fail", 503), ("refuse", 422)):
        assert server.predict("obedient", wish).status == status
    assert server.predict("obedient", b"x", content_type="multipart/form-data").status == 400
    hang_up(server, "obedient", tmp_path / "first")
    labels = {"model_name": "obedient", "model_version": "1.0"}
    gate = tmp_path / "second"
    # Beside the one that runs, and those in the queue, up to eight lie ready in the worker's mailbox.
    with ThreadPoolExecutor(32) as pool:
        asked = []
        while waiting(server, "obedient") < 2:
            asked.append(pool.submit(server.predict, "obedient", f"wait:{gate}"))
            came = {"": 5.0 + len(asked)}
            eventually(lambda came=came: samples(server, "wsgi_ts_requests_total", **labels) == came, within=20)
            eventually(lambda: running(server, "obedient") + waiting(server, "obedient") == len(asked), within=20)
        assert [server.predict("obedient", "fine").status for _ in range(3)] == [503] * 3
        gate.touch()
        assert [each.result().status for each in asked] == [200] * len(asked)
    expected = {"rejected": 3, "client_gone": 1, "timeout": 0, "handler_error": 2, "worker_died": 0, "other": 1}
    eventually(lambda: failed("obedient") == expected, within=20)
    # One request could not be read, so that the handler was not called for it.
    ran = 4 + len(asked)
    for name, count in (("requests", ran + 4), ("executions", ran), ("inferences", ran + 1), ("wasted_executions", 1)):

        def counted(name: str = name) -> dict[str, float]:
            return samples(server, f"wsgi_ts_{name}_total", **labels)

        eventually(lambda counted=counted, count=count: counted() == {"": count}, within=20, what=f"{count} {name}")

    def closed() -> dict[str, float]:
        return samples(server, "wsgi_ts_batches_closed_total", **labels)

    eventually(lambda: sum(closed().values()) == ran + 1, within=20)
    assert closed()["full"] >= 1


def test_deadlines_and_deaths_have_theirs(server: ServerProcess) -> None:
    assert server.predict("hasty", "sleep 0.5").status == 408
    assert server.predict("killed", "sleep 30").status == 500
    assert server.predict("fragile", "die").status == 500
    missed = {"model_name": "hasty"}
    eventually(lambda: samples(server, "wsgi_ts_deadline_misses_total", **missed) == {"": 1}, within=20)
    failures = {"hasty": "timeout", "killed": "timeout", "fragile": "worker_died"}
    for model, reason in failures.items():

        def failed(model: str = model) -> dict[str, float]:
            found = samples(server, "wsgi_ts_request_failures_total", model_name=model)
            return {name: count for name, count in found.items() if count}

        eventually(lambda reason=reason, failed=failed: failed() == {reason: 1}, within=20)
    assert samples(server, "wsgi_ts_deadline_misses_total", model_name="killed") == {"": 0}
    for model, reason in (("killed", "timeout"), ("fragile", "died")):

        def restarted(model: str = model) -> dict[str, float]:
            found = samples(server, "wsgi_ts_worker_restarts_total", model_name=model)
            return {name: count for name, count in found.items() if count}

        eventually(lambda reason=reason, restarted=restarted: restarted() == {reason: 1}, within=20)


def test_without_worker_requests_are_rejected(server: ServerProcess) -> None:
    assert server.register("fragile.mar", model_name="idle", initial_workers=0).status == 200
    assert server.predict("idle").status == 503
    eventually(lambda: samples(server, "wsgi_ts_request_failures_total", model_name="idle")["rejected"] == 1, within=20)
    eventually(lambda: samples(server, "wsgi_ts_requests_total", model_name="idle") == {"": 1}, within=20)
    assert server.request("management", "DELETE", "/models/idle").status == 200


def test_http_requests_are_timed_by_route(server: ServerProcess) -> None:
    def count(method: str, route: str, status: str) -> float:
        labels = {"http_request_method": method, "http_route": route, "http_response_status_code": status}
        return samples(server, "http_server_request_duration_seconds_count", **labels).get("", 0)

    asked = {
        ("POST", "/predictions/{model_name}", "200"): lambda: server.predict("obedient"),
        ("POST", "/predictions/{model_name}/{model_version}", "404"): lambda: server.predict("obedient/9.9"),
        ("GET", "/ping", "200"): lambda: server.request("inference", "GET", "/ping"),
        ("GET", "/models/{model_name}", "404"): lambda: server.request("management", "GET", "/models/nothing"),
        ("GET", "_OTHER", "404"): lambda: server.request("inference", "GET", "/no/such/path/at/all"),
    }
    before = {name: count(*name) for name in asked}
    for (_, _, status), ask in asked.items():
        assert ask().status == int(status)
    for name in asked:
        eventually(lambda name=name: count(*name) == before[name] + 1, within=20)


def test_slots_memory_and_configuration_are_shown(server: ServerProcess, tmp_path: Path) -> None:
    def gauge(name: str) -> float:
        return samples(server, name)[""]

    assert gauge("wsgi_ts_slots") == 3 * 256, "of two web workers and the gRPC server"
    eventually(lambda: gauge("wsgi_ts_slots_in_use") == 0, within=20)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(server.predict, "obedient", f"wait:{tmp_path}/first")
        eventually(lambda: gauge("wsgi_ts_slots_in_use") == 1, within=20)
        (tmp_path / "first").touch()
        assert slow.result().status == 200
    eventually(lambda: gauge("wsgi_ts_slots_in_use") == 0, within=20)
    assert gauge("wsgi_ts_shm_bytes") > 2**20
    assert gauge("wsgi_ts_shm_free_bytes") > 0
    assert gauge("wsgi_ts_config_hash") > 0
    # What a dead web worker has shown goes with it.
    with server.raw() as connection:
        send(connection, "obedient", f"wait:{tmp_path}/second")
        eventually(lambda: gauge("wsgi_ts_slots_in_use") == 1, within=20)
        for web_worker in server.processes("web-worker"):
            web_worker.kill()
        eventually(lambda: (gauge("wsgi_ts_slots"), gauge("wsgi_ts_slots_in_use")) == (3 * 256, 0), within=20)
        (tmp_path / "second").touch()


# What is shipped


def promtool(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs promtool."""
    program = debian.program("promtool")
    assert program is not None
    command = [program, *arguments]
    environment = debian.environment()
    return subprocess.run(
        command, capture_output=True, text=True, check=False, input=stdin, env=environment, timeout=120
    )


def test_the_rules_are_right_and_do_what_their_tests_say() -> None:
    checked = promtool("check", "rules", os.fspath(RULES))
    assert checked.returncode == 0, checked.stderr
    tested = promtool("test", "rules", os.fspath(RULES.with_name("rules_test.yaml")))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    names = {rule["alert"] for group in rule_groups() for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load(RULES.with_name("rules_test.yaml").read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test.get("alert_rule_test", ()) if each["exp_alerts"]}
    assert fired == names, "each alert is seen to fire"


def test_our_names_are_what_prometheus_asks_for(server: ServerProcess) -> None:
    text = server.request("metrics", "GET", "/metrics").text
    found = promtool("check", "metrics", stdin=text)
    ours = [line for line in found.stderr.splitlines() if line.startswith(("wsgi_ts_", "http_server_"))]
    assert ours == []


def test_the_page_on_metrics_names_what_there_is(server: ServerProcess) -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    told = set(re.findall(r"`((?:wsgi_ts|ts|http_server)_\w+)`", tables))

    def shown() -> set[str]:
        found = re.findall(r"# TYPE (\S+)", server.request("metrics", "GET", "/metrics").text)
        return {name for name in found if name.startswith(("wsgi_ts_", "ts_", "http_server_"))}

    eventually(lambda: told - shown() == {"ts_plugin_events_dropped_total"}, within=20, what="all that the page names")
    assert shown() - told == set(), "not in docs/metrics.md"


def rule_groups() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return groups


def queries() -> list[str]:
    """What the dashboard asks, and what the rules do; of an alert what it compares."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    found = [expression.replace("$__rate_interval", "1m").replace("$job", JOB) for expression in found]
    found = [expression.replace("$model", ".*") for expression in found]
    for group in rule_groups():
        found += [rule["record"] for rule in group["rules"] if "record" in rule]
        found += [
            re.sub(r" (>|<|==) [\d.]+( \* [\d.]+)?", "", rule["expr"]) for rule in group["rules"] if "alert" in rule
        ]
    return found


class Prometheus:
    """A running Prometheus that reads a server every half a second; a context manager.

    Args:
        folder: for its files.
        server: the server.
    """

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        (self._port,) = free_ports(1)
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [os.fspath(RULES)],
            "scrape_configs": [
                {"job_name": JOB, "static_configs": [{"targets": [f"127.0.0.1:{server.ports['metrics']}"]}]}
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        program = debian.program("prometheus")
        assert program is not None
        self._command = [
            program,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]
        self._output = folder / "prometheus.log"

    def __enter__(self) -> Prometheus:
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output, env=debian.environment())
        try:
            eventually(self._is_ready, within=60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._output.read_text()
        try:
            return http.request(self._port, "GET", "/-/ready").status == 200
        except OSError:
            return False

    def api(self, path: str, **parameters: str) -> Any:
        """What its API answers."""
        reply = http.request(self._port, "GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}").json()
        assert reply["status"] == "success", (parameters, reply)
        return reply["data"]

    def has_data(self, query: str) -> bool:
        """Whether a query has a result that is a number."""
        return any(not math.isnan(float(each["value"][1])) for each in self.api("query", query=query)["result"])


def _burning(prometheus: Prometheus) -> set[str]:
    """The alerts that are pending or firing; all rules have been evaluated without an error."""
    rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    return {rule["name"] for rule in rules if rule.get("state") in ("pending", "firing")}


@pytest.mark.slow
def test_every_query_finds_data(server: ServerProcess, tmp_path: Path) -> None:
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            for wish in (b"fine", b"fail", b"sleep 0.01"):
                server.predict("obedient", wish)
                server.request("inference", "POST", "/wfpredict/flow", body=wish)
            server.predict("hasty", "sleep 0.3")
            server.request("management", "GET", "/models")
            stopped.wait(0.1)

    def killing() -> None:
        while not stopped.wait(3):
            server.predict("fragile", "die")

    with Prometheus(tmp_path, server) as prometheus, ThreadPoolExecutor() as pool:
        jobs = [pool.submit(work), pool.submit(killing)]
        try:
            missing = queries()
            assert len(missing) > 60
            deadline = time.monotonic() + 200
            while missing and time.monotonic() < deadline:
                missing = [query for query in missing if not prometheus.has_data(query)]
                stopped.wait(0.5)
            assert missing == []
            burn = {"WsgiTsFailureBudgetBurnsFast", "WsgiTsDeadlinesMissed", "WsgiTsPluginFails"}
            eventually(lambda: burn <= _burning(prometheus), within=60, what=f"alerts {burn}")
        finally:
            stopped.set()
        for job in jobs:
            job.result()
