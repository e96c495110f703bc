"""Spans of a running server at an OpenTelemetry collector, and the trace that a client's request belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from support.archives import archive
from support.collector import Collector, Span
from support.eventually import eventually
from support.grpc_client import GrpcClient
from support.server import ServerProcess, free_ports
from support.wars import NAMED, war

TRACE = "12345678901234567890123456789012"
PARENT = "1234567890123456"
#: Answers with the headers of the request that are about its trace.
HEADERS = """
import json
def handle(data, context):
    if not data:
        return None
    answers = []
    for row in range(len(data)):
        headers = context.get_all_request_header(row)
        names = [name for name in headers if name.lower() in ("traceparent", "tracestate")]
        answers.append(json.dumps([[name, headers[name]] for name in names]))
    return answers
"""
RAISES = "def handle(data, context):\n    if data:\n        raise ValueError('not today')\n"
SLEEPS = """
import time
def handle(data, context):
    if data:
        time.sleep(0.1)
        return ["slept"] * len(data)
"""
STAGES = """
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        self.initialized = True
    def preprocess(self, data):
        return data
    def inference(self, data):
        return data
    def postprocess(self, data):
        return ["done"] * len(data)
"""
CHAIN = """
models:
  middle: {url: named.mar}
dag:
  before: [middle]
  middle: [after]
"""


class Place(NamedTuple):
    """A server, and the collector that it sends its spans to."""

    server: ServerProcess
    collector: Collector

    def passed_on(self, *headers: tuple[str, str]) -> list[list[str]]:
        """What a handler gets of a request that is sent with these headers, which may be there more than once."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        head = f"POST /predictions/headers HTTP/1.1\r\nhost: x\r\n{lines}content-length: 1\r\nconnection: close\r\n\r\n"
        with self.server.raw() as connection:
            connection.send(head.encode("latin-1") + b"x")
            line, _, body = connection.read_answer()
        assert line.startswith(b"HTTP/1.1 200")
        passed: list[list[str]] = json.loads(body)
        return passed

    def trace_of(self, *headers: tuple[str, str]) -> tuple[str, str, int, str]:
        """Trace id, parent id, flags and tracestate of what a handler gets."""
        passed = self.passed_on(*headers)
        parents = [value for name, value in passed if name.lower() == "traceparent"]
        assert len(parents) == 1
        match = re.fullmatch(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", parents[0])
        assert match is not None
        assert int(match[1], 16)
        assert int(match[2], 16)
        states = [value for name, value in passed if name.lower() == "tracestate"]
        return match[1], match[2], int(match[3], 16), ",".join(states)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "headers", HEADERS)
    archive(store, "raises", RAISES)
    archive(store, "stages", STAGES)
    archive(store, "batched", SLEEPS, config_yaml="batchPolicy: fixed\nbatchSize: 3\nmaxBatchDelay: 60000")
    archive(store, "named", NAMED)
    war(store, "chain", CHAIN)
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_SERVICE_NAME": "the tests"}
    config = {"preload_modules": "torch"}
    with (
        Collector() as collector,
        ServerProcess(
            store=store, config=config | {"otlp_endpoint": collector.url}, environment=environment, web_workers=2
        ) as server,
    ):
        for name in ("headers", "raises", "stages", "batched"):
            assert server.register(f"{name}.mar").status == 200
        assert server.request("management", "POST", "/workflows?url=chain.war", timeout=60).status == 200
        yield Place(server, collector)


def span_of(place: Place, request_id: str) -> Span:
    [span] = place.collector.wait_for(lambda span: span.attributes.get("wsgi_ts.request.id") == request_id)
    return span


def children(place: Place, parent: Span, count: int) -> dict[str, Span]:
    found = place.collector.wait_for(lambda span: span.parent_id == parent.span_id, count)
    return {span.name: span for span in found}


# -- spans


def test_a_request_is_a_server_span_with_its_parts(place: Place) -> None:
    reply = place.server.predict("stages", b"x", user_agent="tests")
    span = span_of(place, reply.headers["x-request-id"])
    assert place.collector.paths == {"/v1/traces"}
    assert (span.name, span.kind, span.parent_id, span.is_error) == ("POST /predictions/{model}", 2, "", False)
    expected = {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/predictions/{model}",
        "url.path": "/predictions/stages",
        "url.scheme": "http",
        "server.address": "127.0.0.1",
        "client.address": "127.0.0.1",
        "user_agent.original": "tests",
        "network.protocol.version": "1.1",
        "wsgi_ts.model.name": "stages",
        "wsgi_ts.model.version": "1.0",
        "wsgi_ts.batch.size": 1,
    }
    assert {name: span.attributes.get(name) for name in expected} == expected
    assert span.resource["service.name"] == "the tests"
    parts = children(place, span, 4)
    assert {"receive", "queue", "batch", "respond"} <= set(parts)
    assert {"preprocess", "inference", "postprocess"} <= set(children(place, parts["batch"], 3))


def test_a_batch_is_a_span_with_links_to_its_requests(place: Place) -> None:
    with ThreadPoolExecutor(3) as clients:
        replies = list(clients.map(lambda _: place.server.predict("batched", b"x"), range(3)))
    requests = [span_of(place, reply.headers["x-request-id"]) for reply in replies]
    batch = place.collector.wait_for(lambda span: span.name == "batch batched")[0]
    assert batch.attributes["wsgi_ts.batch.size"] == 3
    assert batch.attributes["wsgi_ts.batch.close_reason"] == "full"
    assert set(batch.links) == {(span.trace_id, span.span_id) for span in requests}
    assert batch.parent_id == ""
    assert batch.took_ms >= 100
    # And each of them links to it.
    own = children(place, requests[0], 4)["batch"]
    assert own.links == [(batch.trace_id, batch.span_id)]
    assert [span.name for span in place.collector.wait_for(lambda span: span.parent_id == batch.span_id)] == [
        "inference"
    ]


def test_a_failed_request_is_an_error(place: Place) -> None:
    reply = place.server.predict("raises", b"x")
    span = span_of(place, reply.headers["x-request-id"])
    assert (span.is_error, span.message) == (True, "Prediction failed")
    assert span.attributes["error.type"] == "503"
    batch = place.collector.wait_for(lambda span: span.name == "batch raises")[0]
    assert (batch.is_error, batch.message) == (True, "ValueError: not today")


def test_nodes_of_a_workflow_are_children(place: Place) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    reply = place.server.request("inference", "POST", "/wfpredict/chain", headers=headers, body=b"x")
    span = span_of(place, reply.headers["x-request-id"])
    assert span.name == "POST /wfpredict/{workflow}"
    assert (span.trace_id, span.parent_id) == (TRACE, PARENT)
    nodes = children(place, span, 4)
    assert {"node before", "node middle", "node after"} <= set(nodes)
    assert {"queue", "batch"} <= set(children(place, nodes["node middle"], 2))


def test_grpc_predictions_are_spans_of_their_client_s_trace(place: Place) -> None:
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "foo=1"))
    with GrpcClient(place.server, metadata=metadata) as client:
        passed = json.loads(client.predict("headers", b"x"))
    [span] = place.collector.wait_for(lambda span: span.name.endswith("/Predictions"))
    assert (span.trace_id, span.parent_id, span.trace_state) == (TRACE, PARENT, "foo=1")
    assert ["traceparent", f"00-{TRACE}-{span.span_id}-01"] in passed
    assert ["tracestate", "foo=1"] in passed


def test_what_is_passed_on_names_the_span_of_the_request(place: Place) -> None:
    trace_id, span_id, flags, _ = place.trace_of(("traceparent", f"00-{TRACE}-{PARENT}-01"))
    place.collector.wait_for(lambda span: (span.trace_id, span.span_id) == (trace_id, span_id))
    assert flags == 1


def test_a_trace_that_its_client_does_not_record_has_no_spans(place: Place) -> None:
    other = "2" * 32
    trace_id, _, flags, _ = place.trace_of(("traceparent", f"00-{other}-{PARENT}-00"))
    assert (trace_id, flags) == (other, 0)
    seen = place.server.predict("headers", b"x")
    span_of(place, seen.headers["x-request-id"])  # what came after it is there
    assert not [span for span in list(place.collector.spans) if span.trace_id == other]


def test_explain_names_the_trace(place: Place) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    reply = place.server.request("inference", "POST", "/predictions/stages", headers=headers, body=b"x")
    path = f"/debug/traces/{reply.headers['x-request-id']}"
    eventually(lambda: place.server.request("management", "GET", path).status == 200, within=20, what="the record")
    assert json.loads(place.server.request("management", "GET", path).body)["trace_id"] == TRACE


# -- W3C Trace Context: the cases of the recommendation's conformance suite (w3c/trace-context, test/test.py)

SAMPLED = f"00-{TRACE}-{PARENT}-01"
NOT_SAMPLED = f"00-{TRACE}-{PARENT}-00"


def test_without_a_trace_a_new_one_begins(place: Place) -> None:
    first, second = place.trace_of(), place.trace_of()
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_a_trace_goes_on_with_another_parent(place: Place) -> None:
    found = [place.trace_of(("traceparent", SAMPLED)) for _ in range(3)]
    assert {each[0] for each in found} == {TRACE}
    assert len({each[1] for each in found} | {PARENT}) == 4


def test_two_traceparents_are_none(place: Place) -> None:
    trace_id, *_ = place.trace_of(("traceparent", SAMPLED), ("traceparent", SAMPLED.replace("2-1", "1-1", 1)))
    assert trace_id not in (TRACE, TRACE[:-1] + "1")


@pytest.mark.parametrize("name", ["TraceParent", "TrAcEpArEnT", "TRACEPARENT"])
def test_the_name_counts_in_any_case(place: Place, name: str) -> None:
    assert place.trace_of((name, SAMPLED))[0] == TRACE


@pytest.mark.parametrize("name", ["trace-parent", "trace.parent"])
def test_other_names_do_not_count(place: Place, name: str) -> None:
    assert place.trace_of((name, SAMPLED))[0] != TRACE


@pytest.mark.parametrize(
    "value",
    [
        *(f"{SAMPLED}.", f"{SAMPLED}-what-the-future-will-be-like"),
        f"cc-{TRACE}-{PARENT}-01.what-the-future-will-be-like",
        f"ff-{TRACE}-{PARENT}-01",
        *(f"{version}-{TRACE}-{PARENT}-01" for version in (".0", "0.", "000", "0000", "0")),
        *(
            f"00-{trace}-{PARENT}-01"
            for trace in ("0" * 32, f".{TRACE[1:]}", f"{TRACE[:-1]}.", f"{TRACE}3", TRACE[:-1])
        ),
        *(f"00-{TRACE}-{parent}-01" for parent in ("0" * 16, f".{PARENT[1:]}", f"{PARENT[:-1]}.")),
        *(f"00-{TRACE}-{parent}-01" for parent in (f"{PARENT}7", PARENT[:-1])),
        *(f"00-{TRACE}-{PARENT}-{flags}" for flags in (".0", "0.", "001", "1")),
        SAMPLED.replace("12345678901234567890", "ABCDEFABCDEFABCDEFAB"),
    ],
)
def test_an_invalid_traceparent_begins_a_new_trace(place: Place, value: str) -> None:
    trace_id, _, _, state = place.trace_of(("traceparent", value), ("tracestate", "foo=1"))
    assert trace_id not in value
    assert trace_id not in (TRACE, TRACE[1:] + "3")
    assert state == ""


@pytest.mark.parametrize("value", [f"cc-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like"])
def test_a_later_version_is_read_as_this_one(place: Place, value: str) -> None:
    assert place.trace_of(("traceparent", value))[0] == TRACE


@pytest.mark.parametrize("value", [f" {SAMPLED}", f"\t{SAMPLED}", f"{SAMPLED} ", f"{SAMPLED}\t", f"\t {SAMPLED} \t"])
def test_blanks_around_the_value_do_not_count(place: Place, value: str) -> None:
    assert place.trace_of(("traceparent", value))[0] == TRACE


def test_the_flag_of_random_ids_is_passed_on(place: Place) -> None:
    trace_id, parent, flags, _ = place.trace_of(("traceparent", f"00-{TRACE}-{PARENT}-02"))
    assert (trace_id, flags) == (TRACE, 2)
    assert parent != PARENT


def test_a_tracestate_without_trace_is_dropped(place: Place) -> None:
    assert place.trace_of(("tracestate", "foo=1"))[3] == ""
    assert place.trace_of(("tracestate", "foo=1,bar=2"))[3] == ""


LONG = "z" * 256
OF_VENDOR = f"{'t' * 241}@{'v' * 14}"
KEY = "abcdefghijklmnopqrstuvwxyz0123456789_-*/"
VALUE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in ",=")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["foo=1,bar=2"], "foo=1,bar=2"),
        ([""], ""),
        (["foo=1", ""], "foo=1"),
        (["", "foo=1"], "foo=1"),
        (["foo=1,bar=2", "rojo=1,congo=2", "baz=3"], "foo=1,bar=2,rojo=1,congo=2,baz=3"),
        (["foo=1,foo=1"], "foo=1"),
        (["foo=1,foo=2"], "foo=1"),
        (["foo=1", "foo=2"], "foo=1"),
        ([f"{KEY}={VALUE}"], f"{KEY}={VALUE}"),
        ([f"{KEY}@a-z0-9_-*/={VALUE}"], f"{KEY}@a-z0-9_-*/={VALUE}"),
        (["foo=1 \t , \t bar=2, \t baz=3"], "foo=1,bar=2,baz=3"),
        (["foo=1\t \t,\t \tbar=2,\t \tbaz=3"], "foo=1,bar=2,baz=3"),
        ([" foo=1"], "foo=1"),
        (["\tfoo=1"], "foo=1"),
        (["foo=1 "], "foo=1"),
        (["foo=1\t"], "foo=1"),
        (["\t foo=1 \t"], "foo=1"),
        (["foo =1"], ""),
        (["FOO=1"], ""),
        (["foo.bar=1"], ""),
        (["foo@=1,bar=2"], "foo@=1,bar=2"),
        (["@foo=1,bar=2"], ""),
        (["foo@@bar=1,bar=2"], "foo@@bar=1,bar=2"),
        (["foo@bar@baz=1,bar=2"], "foo@bar@baz=1,bar=2"),
        (["foo=1", f"{LONG}=1"], f"foo=1,{LONG}=1"),
        (["foo=1", f"{LONG}z=1"], ""),
        (["foo=1", f"{OF_VENDOR}=1"], f"foo=1,{OF_VENDOR}=1"),
        (["foo=1", f"{'t' * 242}@v=1"], f"foo=1,{'t' * 242}@v=1"),
        (["foo=1", f"t@{'v' * 15}=1"], f"foo=1,t@{'v' * 15}=1"),
        (["foo=bar=baz"], ""),
        (["foo=,bar=3"], ""),
        ([",".join(f"bar{n:02}={n:02}" for n in range(1, 33))], ",".join(f"bar{n:02}={n:02}" for n in range(1, 33))),
        ([",".join(f"bar{n:02}={n:02}" for n in range(1, 34))], ""),
    ],
)
def test_a_tracestate_is_passed_on_where_it_is_valid(place: Place, values: list[str], expected: str) -> None:
    trace_id, _, _, state = place.trace_of(("traceparent", NOT_SAMPLED), *(("tracestate", value) for value in values))
    assert (trace_id, state) == (TRACE, expected)


@pytest.mark.parametrize("name", ["TraceState", "TrAcEsTaTe", "TRACESTATE"])
def test_its_name_counts_in_any_case(place: Place, name: str) -> None:
    assert place.trace_of(("traceparent", NOT_SAMPLED), (name, "foo=1"))[3] == "foo=1"


@pytest.mark.parametrize("name", ["trace-state", "trace.state"])
def test_other_names_of_it_do_not_count(place: Place, name: str) -> None:
    assert place.trace_of(("traceparent", NOT_SAMPLED), (name, "foo=1"))[3] == ""


# -- a collector that is not there


def test_a_server_whose_collector_is_down_serves(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tmp_path_factory.mktemp("store")
    archive(store, "headers", HEADERS)
    [port] = free_ports(1)
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    with ServerProcess(store=store, environment=environment) as server:
        assert server.register("headers.mar").status == 200
        for _ in range(20):
            assert server.predict("headers", b"x").status == 200
        told = f"The collector at http://127.0.0.1:{port} does not take spans"
        eventually(lambda: told in server.log(), within=30, what="a word of the collector")
        assert server.log().count(told) == 1
        [exporter] = server.processes("span-exporter")
        exporter.kill()
        assert server.predict("headers", b"x").status == 200
        eventually(
            lambda: exporter.pid not in [each.pid for each in server.processes("span-exporter")] != [],
            within=20,
            what="the next exporter",
        )
