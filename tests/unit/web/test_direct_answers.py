"""Answers without a call of the app are the app's, byte for byte."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.http.head import parse_head
from wsgi_ts.instance.instance import Instance
from wsgi_ts.rest.apps import build_app
from wsgi_ts.rest.direct import DirectAnswers
from wsgi_ts.rest.inference import ANSWER_KEY
from wsgi_ts.settings.config import Config
from wsgi_ts.web.app import call_app, environ_of
from wsgi_ts.web.connection import Connection
from wsgi_ts.web.listeners import Endpoint

CONFIGS = (
    Config(),
    Config(cors_allowed_origin="https://a.example", cors_allowed_methods="GET, POST", cors_allowed_headers="X-Req"),
    Config(cors_allowed_origin="*"),
)
REQUESTS = (
    b"POST /predictions/m HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /predictions/m/1.0?a=b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"PUT /explanations/m HTTP/1.0\r\nAccept: text/html\r\n\r\n",
    b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nOrigin: https://b\r\n\r\n",
    b"POST /invocations HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n\r\n",
)


class Peer:
    """A connection without a socket, at an endpoint whose app is the real one."""

    def __init__(self, config: Config) -> None:
        log_files: Any = None
        instance = Instance(config, Path("/nonexistent"), "wsgi-ts-none", log_files)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.endpoint = Endpoint(sock, ("inference",), build_app(("inference",), instance))
        self.direct = DirectAnswers(config)

    def both(self, request: bytes, make: Callable[[], Answer]) -> tuple[bytes, bytes]:
        """What is sent by the app's word, and without it."""
        with socket.socket() as sock:
            connection = Connection(sock, "/127.0.0.1:1", self.endpoint)
        connection.head = parse_head(request)
        connection.request_id = "7d5f0c52-3f67-4b35-8d0b-2d9a3c6a2f10"
        connection.close_after = not connection.head.keep_alive
        environ = environ_of(connection)
        environ[ANSWER_KEY] = make()
        said = call_app(self.endpoint.app, environ)
        answer = make()
        lines = self.direct.head(answer, connection.request_id, connection.after_answer)
        return connection.answer_head(said) + bytes(said.body), lines + bytes(answer.body)


PEERS = [Peer(config) for config in CONFIGS]


def answer_of(status: int, phrase: str, body: bytes, headers: list[tuple[str, str]] | None = None) -> Answer:
    answer = Answer()
    answer.status, answer.phrase, answer.body, answer.headers = status, phrase, body, headers or []
    return answer


@settings(deadline=None)
@given(
    peer=st.sampled_from(PEERS),
    request=st.sampled_from(REQUESTS),
    status=st.integers(200, 299).filter(lambda status: status != 204),
    phrase=st.sampled_from(["", "OK", "Made", "a b"]),
    body=st.binary(max_size=64) | st.sampled_from([b"", b"x" * 20_000]),
)
def test_both_ways_send_the_same(peer: Peer, request: bytes, status: int, phrase: str, body: bytes) -> None:
    by_app, direct = peer.both(request, lambda: answer_of(status, phrase, body))
    assert DirectAnswers.is_for(answer_of(status, phrase, body))
    assert direct == by_app


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("path", [b"/wfpredict/w", b"/WfPredict/w/1/rest", b"/v1/models/w:predict"])
def test_both_ways_send_the_same_of_a_workflow(peer: Peer, path: bytes) -> None:
    headers = [("content-type", "application/json"), ("server-timing", "a;dur=0.100, b;dur=2.000")]
    request = b"POST %b HTTP/1.1\r\nHost: a\r\n\r\n" % path
    by_app, direct = peer.both(request, lambda: answer_of(200, "", b"{}", list(headers)))
    assert DirectAnswers.is_for_workflow(answer_of(200, "", b"{}", headers))
    assert direct == by_app


@pytest.mark.parametrize(
    "answer",
    [
        answer_of(204, "", b""),
        answer_of(404, "", b"x"),
        answer_of(199, "", b"x"),
        answer_of(300, "", b"x"),
        answer_of(200, "", b"x", [("a", "b")]),
    ],
)
def test_other_answers_are_the_apps(answer: Answer) -> None:
    assert not DirectAnswers.is_for(answer)


def test_streams_are_the_apps() -> None:
    answer = answer_of(200, "", b"")
    answer.stream = [b"x"]
    assert not DirectAnswers.is_for(answer)
