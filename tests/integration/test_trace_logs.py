"""Lines that a handler logs name the trace of the requests they were made for, where one is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from support.archives import archive
from support.collector import Collector, Span
from support.eventually import eventually
from support.server import ServerProcess

TRACE = "12345678901234567890123456789012"
PARENT = "1234567890123456"
RECORDED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
NOT_RECORDED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
#: Logs as most handlers do, in a format of its own, from a thread, and with a field that has our name.
SAYS = """
import logging, sys, threading

log = logging.getLogger("plain")
own = logging.getLogger("own")
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("own [%(trace_id)s] [%(span_id)s] [%(request_ids)s] %(message)s"))
own.addHandler(handler)
own.propagate = False

def handle(data, context):
    if not data:
        log.info("loading")
        return None
    words = [bytes(row["body"]).decode() for row in data]
    for word in words:
        log.info("plain %s", word)
        own.info("%s", word)
        own.info("extra %s", word, extra={"trace_id": "mine"})
        thread = threading.Thread(target=own.info, args=("thread %s", word))
        thread.start()
        thread.join()
    if "raise" in words:
        raise ValueError("not today")
    return words
"""
ASYNC = """
import asyncio, logging

class Handler:
    async def initialize(self, context):
        pass
    async def handle(self, data, context):
        word = bytes(data[0]["body"]).decode()
        logging.info("before %s", word)
        await asyncio.sleep(0.2)
        logging.info("after %s", word)
        return [word]
"""


class Place(NamedTuple):
    """A server, and the collector that it sends its spans to."""

    server: ServerProcess
    collector: Collector

    def ask(self, model: str, word: str, headers: dict[str, str] = RECORDED) -> str:
        """Sends one request; returns its id."""
        path = f"/predictions/{model}"
        reply = self.server.request("inference", "POST", path, headers=headers, body=word.encode())
        return reply.headers["x-request-id"]

    def span_of(self, request_id: str) -> Span:
        """The span of a request."""
        [span] = self.collector.wait_for(lambda span: span.attributes.get("wsgi_ts.request.id") == request_id)
        return span


def line_with(server: ServerProcess, text: str, log: str = "model_log.log") -> str:
    """The message of the only line of a log with this text in it, once it is there."""
    found: list[str] = []

    def look() -> bool:
        found[:] = re.findall(rf"MODEL_LOG - (.*{re.escape(text)}.*)", server.log(log))
        return bool(found)

    eventually(look, within=20, what=f"a line with {text}")
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "says", SAYS)
    archive(store, "batched", SAYS, config_yaml="batchPolicy: fixed\nbatchSize: 2\nmaxBatchDelay: 60000")
    archive(store, "async", ASYNC, config_yaml="asyncCommunication: true\nbatchSize: 4")
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
    with (
        Collector() as collector,
        ServerProcess(store=store, config={"otlp_endpoint": collector.url}, environment=environment) as server,
    ):
        for name in ("says", "batched", "async"):
            assert server.register(f"{name}.mar").status == 200
        yield Place(server, collector)


def test_a_line_names_the_trace_and_the_span_of_its_request(place: Place) -> None:
    span = place.span_of(place.ask("says", "alone"))
    assert span.trace_id == TRACE
    expected = f"plain alone trace_id={TRACE} span_id={span.span_id}"
    assert line_with(place.server, "plain alone") == expected
    assert line_with(place.server, "plain alone", "ts_log.log") == expected


def test_a_format_of_the_handler_s_own_has_the_same_fields(place: Place) -> None:
    request_id = place.ask("says", "formatted")
    span = place.span_of(request_id)
    fields = f"own [{TRACE}] [{span.span_id}] [{request_id}]"
    assert line_with(place.server, "] formatted") == f"{fields} formatted"
    assert line_with(place.server, "thread formatted") == f"{fields} thread formatted"


def test_what_the_handler_calls_so_itself_counts(place: Place) -> None:
    place.ask("says", "called")
    assert line_with(place.server, "extra called").startswith("own [mine] [")


def test_lines_of_a_batch_are_in_the_trace_of_the_batch(place: Place) -> None:
    with ThreadPoolExecutor(2) as clients:
        ids = list(clients.map(lambda word: place.ask("batched", word), ("first", "second")))
    requests = {place.span_of(each).span_id for each in ids}
    [batch] = place.collector.wait_for(lambda span: span.name == "batch batched")
    assert {span_id for _, span_id in batch.links} == requests
    line = line_with(place.server, "plain first")
    assert line == f"plain first trace_id={batch.trace_id} span_id={batch.span_id}"
    own = line_with(place.server, "] second")
    assert set(re.findall(r"\[([^\]]*)\] second", own)[0].split(",")) == set(ids)


def test_a_failure_names_its_trace(place: Place) -> None:
    span = place.span_of(place.ask("says", "raise"))
    line = line_with(place.server, "Invoking custom service failed.")
    assert line == f"Invoking custom service failed. trace_id={TRACE} span_id={span.span_id}"


def test_requests_that_run_side_by_side_have_lines_of_their_own(place: Place) -> None:
    words = ("one", "two", "three")
    with ThreadPoolExecutor(3) as clients:
        ids = list(clients.map(lambda word: place.ask("async", word), words))
    for word, request_id in zip(words, ids, strict=True):
        span_id = place.span_of(request_id).span_id
        for moment in ("before", "after"):
            assert line_with(place.server, f"{moment} {word}").endswith(f" trace_id={TRACE} span_id={span_id}")


def test_without_a_recorded_trace_lines_are_as_ever(place: Place) -> None:
    place.ask("says", "unrecorded", NOT_RECORDED)
    assert line_with(place.server, "plain unrecorded") == "plain unrecorded"
    assert line_with(place.server, "] unrecorded") == "own [] [] [] unrecorded"


def test_without_a_collector_the_fields_are_there_and_empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tmp_path_factory.mktemp("store")
    archive(store, "says", SAYS)
    with ServerProcess(store=store) as server:
        assert server.register("says.mar").status == 200
        server.request("inference", "POST", "/predictions/says", headers=RECORDED, body=b"quiet")
        assert line_with(server, "plain quiet") == "plain quiet"
        assert line_with(server, "] quiet") == "own [] [] [] quiet"
