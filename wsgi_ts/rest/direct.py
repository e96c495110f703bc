"""Answers that leave without a call of the app: predictions that a handler has answered without headers of its own.

Most answers are of this kind, and the app would be half of what a web worker spends on them. The Falcon app answers all
others and stays the reference: a test compares both, byte for byte.
"""

from __future__ import annotations

from typing import Final

from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.rest.apps import cors_headers
from wsgi_ts.rest.responses import BASE_HEADERS
from wsgi_ts.settings.config import Config

_NO_CONTENT: Final = 204


class DirectAnswers:
    """Writes the head of such answers."""

    def __init__(self, config: Config) -> None:
        common = {**BASE_HEADERS, **cors_headers(config)}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in common.items())

    @staticmethod
    def is_for(answer: Answer) -> bool:
        """Returns whether an answer is of this kind: a 2xx with a body, whole, without headers of the handler."""
        if answer.error is not None or answer.stream is not None or answer.headers:
            return False
        return 200 <= answer.status < 300 and answer.status != _NO_CONTENT

    @staticmethod
    def is_for_workflow(answer: Answer) -> bool:
        """Returns whether the answer of a workflow is of this kind: its headers are the server's own."""
        return answer.error is None and answer.stream is None

    def head(self, answer: Answer, request_id: str, connection: str) -> bytes:
        """Returns the status line and the headers; `connection` is `close` or `keep-alive`."""
        own = "".join([f"{name}: {value}\r\n" for name, value in answer.headers]) if answer.headers else ""
        return (
            f"HTTP/1.1 {answer.status} {answer.phrase}\r\n{self._fields}x-request-id: {request_id}\r\n{own}"
            f"content-length: {len(answer.body)}\r\nconnection: {connection}\r\n\r\n"
        ).encode("latin-1")
