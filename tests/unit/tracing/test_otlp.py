"""How spans are sent to a collector, by OpenTelemetry's variables."""

from __future__ import annotations

import gzip
import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.eventually import eventually

from wsgi_ts.tracing.otlp import SenderOptions, SpanSender, traces_url


class Answering:
    """A collector that answers with these statuses, one after the other, and then with 200."""

    def __init__(self, *statuses: int, headers: Mapping[str, str]) -> None:
        self.came: list[tuple[dict[str, str], bytes]] = []
        left = list(statuses)
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.came.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(left.pop(0) if left else 200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


Start = Callable[..., Answering]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Answering] = []

    def begin(*statuses: int, **headers: str) -> Answering:
        made.append(Answering(*statuses, headers={name.replace("_", "-"): text for name, text in headers.items()}))
        return made[-1]

    yield begin
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def sent(collector: Answering, message: bytes = b"m", **environ: str) -> SpanSender:
    """A sender that has been given one message of 3 spans, and has finished with it."""
    variables = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in environ.items()}
    sender = SpanSender(collector.url, SenderOptions.of(collector.url, variables))
    sender.send(message, 3)
    sender.close(60)
    return sender


def test_a_message_is_posted_once(start: Start) -> None:
    collector = start()
    sent(collector, HEADERS="authorization=Bearer%20x,tenant=a")
    [(headers, body)] = collector.came
    assert body == b"m"
    assert headers["content-type"] == "application/x-protobuf"
    assert (headers["authorization"], headers["tenant"]) == ("Bearer x", "a")
    assert headers["user-agent"].startswith("wsgi-ts/")


@pytest.mark.parametrize(("name", "opened"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_it_is_compressed_where_that_is_wanted(start: Start, name: str, opened: Callable[[bytes], bytes]) -> None:
    collector = start()
    sent(collector, b"m" * 1000, COMPRESSION=name)
    [(headers, body)] = collector.came
    assert (headers["content-encoding"], opened(body)) == (name, b"m" * 1000)
    assert len(body) < 100


def test_what_a_busy_collector_refuses_is_sent_again(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    collector = start(503, 429)
    sent(collector)
    assert [body for _, body in collector.came] == [b"m"] * 3
    assert "does not take" not in caplog.text


def test_what_it_does_not_want_is_lost_at_once(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    collector = start(400)
    sent(collector)
    assert len(collector.came) == 1
    assert "does not take spans; 3 are lost so far" in caplog.text


def test_a_collector_that_wants_a_longer_pause_than_there_is_gets_none(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    collector = start(503, retry_after="30")
    sent(collector, TIMEOUT="2")
    assert len(collector.came) == 1
    assert "3 are lost" in caplog.text


def test_it_is_said_when_spans_are_taken_again(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    collector = start(404, 404)
    sender = SpanSender(collector.url, SenderOptions.of(collector.url, {}))
    for _ in range(3):
        sender.send(b"m", 2)
    sender.close(60)
    assert caplog.text.count("does not take spans") == 1
    assert "takes spans again; 4 were lost" in caplog.text


def test_a_collector_that_comes_and_goes_is_told_of_once_a_minute(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    collector = start(404, 200, 404, 200, 404)
    sender = SpanSender(collector.url, SenderOptions.of(collector.url, {}))
    for _ in range(6):
        sender.send(b"m", 2)
    sender.close(60)
    assert len(collector.came) == 6
    assert caplog.text.count("does not take spans") == 1
    assert caplog.text.count("takes spans again") == 1


def test_what_does_not_fit_in_the_queue_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = "http://127.0.0.1:9"
    options = SenderOptions.of(nowhere, {"OTEL_BSP_MAX_QUEUE_SIZE": "10", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "5"})
    sender = SpanSender(nowhere, options._replace(timeout_s=60.0))
    for _ in range(4):  # one is being sent, two wait
        sender.send(b"m", 5)
    eventually(lambda: "5 are lost so far" in caplog.text, within=20, what="a word of lost spans")
    sender.close(0)


def test_more_spans_than_the_queue_has_room_for_are_sent_where_nothing_else_waits(start: Start) -> None:
    collector = start()
    options = SenderOptions.of(collector.url, {"OTEL_BSP_MAX_QUEUE_SIZE": "10", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10"})
    sender = SpanSender(collector.url, options)
    sender.send(b"m", 12)
    sender.close(60)
    assert len(collector.came) == 1


def test_a_file_with_certificates_that_is_not_there_costs_spans(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    options = SenderOptions.of("https://127.0.0.1:9", {"OTEL_EXPORTER_OTLP_CERTIFICATE": "/nowhere"})
    sender = SpanSender("https://127.0.0.1:9", options)
    sender.send(b"m", 1)
    sender.close(60)
    assert "1 are lost" in caplog.text


def test_variables_for_traces_count_before_those_for_all() -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_HEADERS": "a=1",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "b=2",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "4",
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "c.pem",
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY": "k.pem",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": "ca.pem",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "nonsense",
    }
    options = SenderOptions.of("http://c:4318/", environ)
    assert options == SenderOptions(
        "http://c:4318/v1/traces", {"b": "2"}, 4.0, "none", "ca.pem", ("c.pem", "k.pem"), 0.1, 8192, 65536
    )


@pytest.mark.parametrize(
    ("endpoint", "environ", "url"),
    [
        ("http://c:1", {}, "http://c:1/v1/traces"),
        ("http://c:1/own/v1/traces", {}, "http://c:1/own/v1/traces"),
        ("http://c:1/own", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:1/own"}, "http://c:1/own"),
    ],
)
def test_where_spans_are_sent(endpoint: str, environ: dict[str, str], url: str) -> None:
    assert traces_url(endpoint, environ) == url
