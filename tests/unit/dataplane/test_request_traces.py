"""How traces of requests are begun, and which requests get a record."""

from __future__ import annotations

import json
import selectors
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.batcher.shm.request_codec import Times
from wsgi_ts.dataplane.http_facts import client_of, http_facts, route_of
from wsgi_ts.dataplane.request_traces import RequestTraces, error_text
from wsgi_ts.dataplane.stories import NodeRun, Told, request_record
from wsgi_ts.errors import ServerError
from wsgi_ts.tracing.context import TraceContext, new_trace
from wsgi_ts.tracing.options import TraceOptions
from wsgi_ts.tracing.post import Inlet

HEAD = b"POST /predictions/m HTTP/1.1\r\nhost: x\r\n\r\n"
TRACE, PARENT = "1" * 32, "2" * 16
MS = 1_000_000


class Place:
    """What keeps and what exports records, and the traces of a process between them."""

    def __init__(self, folder: Path, *, keep: int = 2, ratio: float = 1.0, has_spans: bool = True) -> None:
        self.kept: list[dict[str, Any]] = []
        self.exported: list[list[Any]] = []
        self._selector = selectors.DefaultSelector()
        self._inlets = [
            Inlet(folder / name, self._selector, lambda line, to=to: to.append(json.loads(line)))  # type: ignore[misc]
            for name, to in (("kept", self.kept), ("exported", self.exported))
        ]
        options = TraceOptions(str(folder / "kept"), str(folder / "exported") if has_spans else "", keep, 0, ratio)
        self.traces = RequestTraces(options, lambda name: None, None)

    def tell(self, took_ms: int, status: int = 200, trace: TraceContext | None = None, **more: Any) -> bool:
        """Tells of a request as a process does that has answered it; returns whether it was worth it."""
        worth = self.traces.is_worth_it("m", status, took_ms * MS, trace)
        if worth:
            times = 1, 2, 1 + took_ms * MS
            self.traces.tell(Told("id", "m", "1.0", "http", "POST", "/", status, None, *times, trace=trace, **more))
        self.take()
        return worth

    def take(self) -> None:
        """Takes all that has come."""
        while ready := self._selector.select(0):
            for key, _ in ready:
                key.data()

    def close(self) -> None:
        self.traces.close()
        for inlet in self._inlets:
            inlet.close()
        self._selector.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def test_a_sampled_trace_goes_on_in_the_head(place: Place) -> None:
    head, ours, parent = place.traces.begin(HEAD, f"00-{TRACE}-{PARENT}-01".encode(), b"a=1")
    assert ours is not None
    assert (ours.trace_id, ours.state, parent) == (TRACE, "a=1", PARENT)
    assert f"traceparent: 00-{TRACE}-{ours.span_id}-01\r\ntracestate: a=1\r\n\r\n".encode() in head


def test_the_ratio_counts_for_those_without_a_trace_only(tmp_path: Path) -> None:
    place = Place(tmp_path, ratio=0.0)
    assert place.traces.begin(HEAD, None, b"") == (HEAD, None, "")
    _, ours, _ = place.traces.begin(HEAD, f"00-{TRACE}-{PARENT}-01".encode(), b"")
    assert ours is not None
    head, ours, parent = place.traces.begin(HEAD, f"00-{TRACE}-{PARENT}-00".encode(), b"")
    assert (ours, parent) == (None, PARENT)
    assert f"traceparent: 00-{TRACE}-".encode() in head
    # What is invalid is not passed on: a trace begins that nobody records.
    head, ours, _ = place.traces.begin(HEAD, b"", b"a=1")
    assert ours is None
    assert b"traceparent: 00-" in head
    assert b"tracestate" not in head
    place.close()


def test_a_part_of_the_requests_is_sampled(tmp_path: Path) -> None:
    place = Place(tmp_path, ratio=0.25)
    count = sum(place.traces.begin(HEAD, None, b"")[1] is not None for _ in range(4000))
    assert 800 < count < 1200
    place.close()


def test_what_is_exported_may_wait_for_others_but_not_beyond_the_end(place: Place) -> None:
    place.traces.gather()
    for told in (1, 2):
        assert place.tell(5, trace=new_trace(is_sampled=True))
        assert len(place.kept) == told, "what is kept is asked for at once"
        assert len(place.exported) == told - 1
        place.traces.look(0.0) if told == 1 else place.traces.close()
        place.take()
        assert len(place.exported) == told


def test_slow_and_failed_ones_are_kept_and_sampled_ones_exported(place: Place) -> None:
    assert [place.tell(took) for took in (5, 6, 4)] == [True, True, False]
    assert place.tell(1, status=503)
    assert [(each["kept_because"], each["duration_ms"]) for each in place.kept] == [
        *(("slow", 5.0), ("slow", 6.0)),
        ("failed", 1.0),
    ]
    assert place.exported == []
    trace = new_trace(is_sampled=True)
    assert place.tell(1, trace=trace, parent=PARENT)
    assert place.kept[-1]["kept_because"] == "sampled"
    [[kind, exported]] = place.exported
    told = Told.from_json(exported)
    assert kind == "request"
    assert (told.request_id, told.trace, told.parent, told.times) == ("id", trace, PARENT, None)
    assert request_record(told, "sampled")["trace_id"] == trace.trace_id


def test_names_of_models_that_there_are_not_are_not_remembered(place: Place) -> None:
    for number in range(200):
        place.traces.tell(Told("id", f"m{number}", None, "http", "POST", "/", 404, "no", 1, 0, 2))
    place.tell(9)
    assert place.traces.slowest.thresholds.keys() <= {"m"}
    assert 20 <= sum(each["kept_because"] == "failed" for each in place.kept) < 60


def test_many_failures_are_not_all_written_down(place: Place) -> None:
    place.tell(9)
    place.tell(9)
    for _ in range(200):
        place.tell(1, status=503)
    assert 20 <= sum(each["kept_because"] == "failed" for each in place.kept) < 60


def test_the_parts_follow_from_the_times(place: Place) -> None:
    times = Times(3 * MS, 8 * MS, 2 * MS, 4, 9000, 2, 1, 4e-3, 5e-3, 6e-3, 7e-3)
    told = Told("id", "m", "1.0", "http", "POST", "/", 200, None, 0, 1 * MS, 9 * MS, times)
    place.traces.tell(told)
    place.tell(0)
    [record] = place.kept[:1]
    assert [(span["name"], span["start_ms"], span["duration_ms"]) for span in record["spans"]] == [
        *(("receive", 0.0, 1.0), ("queue", 1.0, 1.0), ("batch", 2.0, 6.0), ("handover", 2.0, 1.0)),
        *(("preprocess", 4.0, 1.0), ("inference", 5.0, 1.0), ("postprocess", 6.0, 1.0), ("respond", 8.0, 1.0)),
    ]
    assert (record["batch_size"], record["batch_close_reason"], record["worker"]) == (2, "full", 9000)
    assert record["batch"] == f"9000-4-{2 * MS}"


def test_what_is_told_survives_json() -> None:
    times = Times(3 * MS, 8 * MS, 2 * MS, 4, 9000, 2, 1, 4e-3, 5e-3, 6e-3, 7e-3)
    nodes = [
        NodeRun("a", -1, 1, 2, "done", 1, "w__a", None, times),
        NodeRun("b", 0, 1, 2, "failed", 2, "m", "2.0", None),
    ]
    told = Told("id", "m", None, "workflow", "POST", "/", 200, None, 0, 1, 2, times, nodes, new_trace(is_sampled=True))
    assert Told.from_json(json.loads(json.dumps(told))) == told


def test_a_client_has_an_address_and_a_port() -> None:
    assert client_of("/10.0.0.1:5") == ("10.0.0.1", 5)
    assert client_of("::1:5") == ("::1", 5)
    assert client_of("/unix:") == ("unix", None)


def test_the_facts_of_http_follow_from_the_head() -> None:
    head = "POST /v2/models/m/infer?a=1&token=secret HTTP/1.1\r\nHost: h:8080\r\nUser-Agent: u\r\n\r\n"
    assert http_facts(head, "10.0.0.1", is_tls=True, name="m", is_workflow=False) == {
        **{"url.scheme": "https", "url.query": "a=1&token=***", "http.route": "/v2/models/{model}/infer"},
        **{"network.protocol.version": "1.1", "client.address": "10.0.0.1"},
        **{"server.address": "h", "server.port": 8080, "user_agent.original": "u"},
    }


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/predictions/m", "/predictions/{model}"),
        ("/predictions/m/1.0", "/predictions/{model}/{version}"),
        ("/predictions/m/1.0/a/b/c/d/e", "/predictions/{model}/{version}/{rest}"),
        ("/v1/models/m:predict", "/v1/models/{model}:predict"),
        ("/models/m/invoke", "/models/{model}/invoke"),
        ("/m/predict", "/{model}/predict"),
        ("/m/2.0/predict", "/{model}/{version}/predict"),
        ("/invocations", "/invocations"),
    ],
)
def test_a_route_names_what_varies(path: str, route: str) -> None:
    assert route_of(path, "m", is_workflow=False) == route


def test_a_workflow_s_route() -> None:
    assert route_of("/wfpredict/w", "w", is_workflow=True) == "/wfpredict/{workflow}"


def test_without_stages_all_of_the_handler_is_inference() -> None:
    assert Times(1, 9, 1, 1, 1, 1, 1, 2e-9, 0.0, 0.0, 8e-9).stages() == [("inference", 2, 8)]
    assert Times(1, 9, 1, 1, 1, 1, 1, 0.0, 0.0, 0.0, 0.0).stages() == []


def test_an_error_s_text_is_one_line() -> None:
    assert error_text(None) is None
    assert error_text(ServerError("a\nb  c")) == "a b c"
    assert error_text(ServerError("")) == "ServerError"


@pytest.mark.parametrize("port", ["9" * 5000, "\xb2", "x", ""])
def test_a_port_that_is_none_is_left_out(port: str) -> None:
    head = f"POST /predictions/m HTTP/1.1\r\nhost: h:{port}\r\n"
    assert http_facts(head, "10.0.0.1", is_tls=False, name="m", is_workflow=False)["server.port"] is None
