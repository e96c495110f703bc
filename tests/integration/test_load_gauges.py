"""What a server tells those who decide how many there should be, and proxies that choose among several."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import orca_pb2, request
from support.http2 import Answer, Http2Client
from support.server import ServerProcess

from wsgi_ts.rpc.messages import INFERENCE
from wsgi_ts.rpc.wire import framed

HELD = """
import os, time

def handle(data, context):
    if data is None:
        return None
    while not os.path.exists(os.environ["GATE"]):
        time.sleep(0.02)
    return [row["body"] for row in data]
"""

CACHE = """
import os

from wsgi_ts.handlers.toolkit.kv_cache import report_kv_cache_usage

def handle(data, context):
    if data is None:
        return None
    text = bytes(data[0]["body"])
    if text == b"end":
        os._exit(1)
    report_kv_cache_usage(context, float(text))
    return ["told"]
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate") / "gate"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, gate: Path) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "held", HELD)
    archive(store, "echo")
    archive(store, "cache", CACHE)
    config = {"metrics_mode": "prometheus", "vllm_metric_names": "true", "endpoint_load_metrics": "true"}
    with ServerProcess(store=store, config=config, environment={"GATE": os.fspath(gate)}) as running:
        for name in ("held", "echo"):
            assert running.register(f"{name}.mar").status == 200
        yield running


def gauges(server: ServerProcess, model: str = "held") -> dict[str, float]:
    """The gauges of a model, read as a gateway reads them: by name and label."""
    text = server.request("metrics", "GET", "/metrics").text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.type == "gauge" and sample.labels.get("model_name") == model
    }


def load_at_the_end(server: ServerProcess, model: str) -> Any:
    """What a call of gRPC tells of the load, whether it ends well or not. grpcio keeps that to itself."""

    async def ask() -> Answer:
        client = await Http2Client.to(server.ports["grpc_inference"])
        message = framed(request(model, b"x").SerializeToString())
        answer = await client.answer(client.ask(f"/{INFERENCE}.InferenceAPIsService/Predictions", message))
        await client.close()
        return answer

    answer = asyncio.run(ask())
    assert (answer.status == 0) == (model == "echo")
    value = answer.fields["endpoint-load-metrics-bin"]
    return orca_pb2.OrcaLoadReport.FromString(base64.b64decode(value + "=" * (-len(value) % 4)))


def test_queue_running_requests_and_offered_load(server: ServerProcess, gate: Path) -> None:
    gauges(server)
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(server.predict, "held", b"x") for _ in range(3)]

        def full() -> bool:
            now = gauges(server)
            return (now["ts_queue_depth"], now["ts_running_requests"]) == (2, 1) and now["ts_worker_busy_ratio"] == 1

        eventually(full, within=10)
        now = gauges(server)
        assert (now["vllm:num_requests_waiting"], now["vllm:num_requests_running"]) == (2, 1)
        waited = now["ts_queue_wait_seconds"]
        assert waited > 0
        eventually(lambda: gauges(server)["ts_queue_wait_seconds"] >= waited + 0.3, within=5)
        assert "ts_capacity_rps" not in now, "nothing is known yet"
        reply = server.predict("echo", b"x")
        kind, _, value = reply.headers["endpoint-load-metrics"].partition(" ")
        load = json.loads(value)
        # The request that is answered may still count.
        assert (kind, load["named_metrics"]["queue_depth"]) == ("JSON", 2)
        assert load["named_metrics"]["running_requests"] in (1, 2)
        assert load["application_utilization"] in (1.5, 2), "three or four requests for two workers"
        for model in ("echo", "nothing"):
            report = load_at_the_end(server, model)
            assert report.named_metrics["queue_depth"] == 2
            assert report.application_utilization in (1.5, 2)
        gate.touch()
        assert [each.result().status for each in held] == [200] * 3
    eventually(lambda: gauges(server).get("ts_capacity_rps", 0) > 0, within=10)
    present = ("ts_queue_depth", "ts_running_requests", "ts_queue_wait_seconds")
    # What is present is looked at four times a second.
    eventually(lambda: [gauges(server)[name] for name in present] == [0, 0, 0], within=5)
    assert 0 <= gauges(server)["ts_worker_busy_ratio"] <= 1

    def load_is_told() -> bool:
        assert server.predict("held", b"x").status == 200
        return gauges(server)["ts_desired_replicas_hint"] > 0

    eventually(load_is_told, within=5)  # the load of the last ten seconds


def test_errors_tell_the_load_too_and_a_model_that_goes_takes_its_gauges_along(server: ServerProcess) -> None:
    assert "endpoint-load-metrics" in server.predict("nothing").headers
    assert server.request("management", "DELETE", "/models/echo").status == 200
    eventually(lambda: gauges(server, "echo") == {}, within=5)
    assert server.register("echo.mar").status == 200
    eventually(lambda: gauges(server, "echo").get("ts_queue_depth") == 0, within=5)


def is_shown(server: ServerProcess, usage: float | None) -> bool:
    """Whether the model `cache` has this usage under our name, under vLLM's, and so has the server in its answers."""
    now = gauges(server, "cache")
    _, _, load = server.predict("echo", b"x").headers["endpoint-load-metrics"].partition(" ")
    named = json.loads(load)["named_metrics"]
    names = ("ts_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc")
    return [*map(now.get, names), named.get("kv_cache_usage_perc")] == [usage] * 3


def test_a_kv_cache_is_shown_for_as_long_as_the_worker_lives_that_tells_of_it(server: ServerProcess) -> None:
    assert server.register("cache.mar").status == 200
    assert is_shown(server, None)
    for usage in (0.25, 0.0, 1.0):
        assert server.predict("cache", str(usage)).status == 200
        eventually(partial(is_shown, server, usage), within=5)
    assert load_at_the_end(server, "echo").named_metrics["kv_cache_usage_perc"] == 1
    assert server.predict("cache", "1.5").status == 503, "no such usage"
    assert is_shown(server, 1)
    assert server.predict("cache", "end").status == 500
    eventually(partial(is_shown, server, None), within=5)
    eventually(lambda: gauges(server, "cache")["wsgi_ts_workers_ready"] == 1, within=20)
    assert is_shown(server, None)
    assert server.predict("cache", "0.5").status == 200
    eventually(partial(is_shown, server, 0.5), within=5)
    assert server.request("management", "DELETE", "/models/cache").status == 200
    eventually(partial(is_shown, server, None), within=5)


def test_vllms_names_are_shown_by_a_switch_only(tmp_path: Path) -> None:
    archive(tmp_path, "cache", CACHE)
    with ServerProcess(store=tmp_path, config={"metrics_mode": "prometheus"}) as server:
        assert server.register("cache.mar").status == 200
        assert server.predict("cache", "0.25").status == 200
        eventually(lambda: gauges(server, "cache").get("ts_kv_cache_usage_ratio") == 0.25, within=5)
        assert not [name for name in gauges(server, "cache") if name.startswith("vllm")]
