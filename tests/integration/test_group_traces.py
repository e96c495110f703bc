"""What ranks tell of their part in a batch: spans at a collector, on the CPU, over gloo."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from support.archives import archive
from support.collector import Collector, Span
from support.eventually import eventually
from support.server import WITH_TORCH, ServerProcess

NOT_RECORDED = {"traceparent": f"00-{'3' * 32}-{'4' * 16}-00"}
#: Each rank takes longer than the one before.
TENSOR_PARALLEL = """
import logging, time
import torch
import torch.distributed as dist

class Handler:
    def initialize(self, context):
        dist.init_process_group("gloo")
        self.rank = dist.get_rank()

    def handle(self, data, context):
        words = [bytes(row["body"]).decode() for row in data]
        logging.info("rank %d has %s", self.rank, words[0])
        dist.all_reduce(torch.ones(1))
        time.sleep(self.rank * 0.1)
        if "raise" in words:
            raise ValueError(f"asked to on {self.rank}")
        return words
"""
#: Calls its pipeline three times for each batch.
PIPELINE = """
import time
import torch
from ts.handler_utils.distributed.pt_pippy import get_pipeline_driver
from ts.torch_handler.distributed.base_pippy_handler import BasePippyHandler

class ModelHandler(BasePippyHandler):
    def initialize(self, context):
        super().initialize(context)
        model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(8, 8), torch.nn.Tanh())])
        self.model = get_pipeline_driver(model, self.world_size, context)
        self.initialized = True

    def handle(self, data, context):
        value = torch.zeros(len(data), 8)
        for _ in range(3):
            value = self.model(value)
            # Longer than a rank waits before it looks whether there is more to come.
            time.sleep(0.5)
        return [str(row.shape[0]) for row in value]
"""


def config_yaml(kind: str, ranks: int) -> str:
    """The model-config.yaml of a group."""
    torchrun = {"nproc-per-node": ranks, "OMP_NUMBER_THREADS": 1}
    return json.dumps({"minWorkers": 1, "maxWorkers": 1, "parallelType": kind, "torchrun": torchrun})


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "tp", TENSOR_PARALLEL, config_yaml=config_yaml("tp", 3))
    archive(store, "pp", PIPELINE, config_yaml=config_yaml("pp", 2))
    config = WITH_TORCH | {"otlp_endpoint": collector.url}
    with ServerProcess(store=store, config=config, environment={"OTEL_BSP_SCHEDULE_DELAY": "100"}) as server:
        for name in ("tp", "pp"):
            assert server.register(f"{name}.mar").status == 200
        yield server


def batch_of(collector: Collector, request_id: str) -> Span:
    """The span of a request's batch."""
    [batch] = collector.wait_for(lambda span: request_id in span.attributes.get("wsgi_ts.batch.requests", ()))
    return batch


def ranks_of(collector: Collector, batch: Span, count: int) -> list[Span]:
    """The spans of the ranks in a batch, in their order."""

    def is_rank(span: Span) -> bool:
        return span.parent_id == batch.span_id and span.name.startswith("rank ")

    found = collector.wait_for(is_rank, count)
    assert {span.trace_id for span in found} == {batch.trace_id}
    return sorted(found, key=lambda span: span.name)


def test_each_rank_has_a_span_of_its_own_time(server: ServerProcess, collector: Collector) -> None:
    reply = server.predict("tp", "hello")
    batch = batch_of(collector, reply.headers["x-request-id"])
    ranks = ranks_of(collector, batch, 3)
    assert [span.name for span in ranks] == ["rank 0", "rank 1", "rank 2"]
    assert [span.attributes["wsgi_ts.rank"] for span in ranks] == [0, 1, 2]
    assert {span.attributes["wsgi_ts.device"] for span in ranks} == {"cpu"}
    assert {span.attributes["wsgi_ts.rank.calls"] for span in ranks} == {1}
    assert not any("wsgi_ts.gpu" in span.attributes for span in ranks)
    # The handler of rank n sleeps n * 0.1 s.
    assert ranks[1].took_ms >= 100
    assert ranks[2].took_ms >= 200


def test_what_a_rank_raises_is_in_its_span(server: ServerProcess, collector: Collector) -> None:
    reply = server.predict("tp", "raise")
    assert reply.status == 503
    ranks = ranks_of(collector, batch_of(collector, reply.headers["x-request-id"]), 3)
    assert [span.message for span in ranks] == [f"ValueError: asked to on {rank}" for rank in range(3)]


def test_every_rank_s_lines_name_the_trace(server: ServerProcess, collector: Collector) -> None:
    request_id = server.predict("tp", "logged").headers["x-request-id"]
    [span] = collector.wait_for(lambda span: span.attributes.get("wsgi_ts.request.id") == request_id)
    end = f" trace_id={span.trace_id} span_id={span.span_id}"
    for rank in range(3):
        line = f"rank {rank} has logged{end}"
        eventually(lambda: line in server.log("model_log.log"), within=10, what=line)  # noqa: B023
    # The next tests count the spans of ranks.
    ranks_of(collector, batch_of(collector, request_id), 3)


def test_a_rank_of_a_pipeline_has_one_span_for_all_it_is_told(server: ServerProcess, collector: Collector) -> None:
    replies = [server.predict("pp", "x") for _ in range(2)]
    for reply in replies:
        assert reply.text == "8"
        ranks = ranks_of(collector, batch_of(collector, reply.headers["x-request-id"]), 2)
        assert [(span.name, span.attributes["wsgi_ts.rank.calls"]) for span in ranks] == [("rank 0", 1), ("rank 1", 3)]


def test_a_batch_whose_trace_is_not_recorded_has_none(server: ServerProcess, collector: Collector) -> None:
    before = len([span for span in list(collector.spans) if span.name.startswith("rank ")])
    path = "/predictions/tp"
    reply = server.request("inference", "POST", path, headers=NOT_RECORDED, body=b"silent")
    assert reply.status == 200
    seen = server.predict("tp", "seen")
    ranks_of(collector, batch_of(collector, seen.headers["x-request-id"]), 3)
    assert len([span for span in list(collector.spans) if span.name.startswith("rank ")]) == before + 3
    silent = re.compile(r"rank 1 has silent$", re.MULTILINE)
    eventually(lambda: silent.search(server.log("model_log.log")), within=5, what="the line without a trace")
