"""Requests and their answers as lines of a file: what a model was asked, to be asked again.

A line is a JSON object. People may write such files, too: only a body is needed.

    {"request": "POST /predictions/digits HTTP/1.1", "headers": {"Content-Type": "application/json"}, "body": "[1, 2]",
     "status": 200, "answer": "3"}

Bytes that are no UTF-8 stand as `body_base64` and `answer_base64`.
"""

from __future__ import annotations

import base64
import json
import logging
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: Headers that say who is asking are never written.
_SECRET_HEADERS = frozenset(("authorization", "cookie", "proxy-authorization", "x-api-key"))
_REQUEST_LINE = "POST /predictions/model HTTP/1.1"
#: How many requests of each worker are recorded where the model-config.yaml names no number.
DEFAULT_REQUESTS = 100


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request, and what it was answered with.

    Attributes:
        request: the request line.
        headers: names as sent, and values.
        status: HTTP status of the answer; None where none is known.
    """

    request: str = _REQUEST_LINE
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    status: int | None = None
    answer: bytes = b""

    @property
    def content_type(self) -> str | None:
        """The Content-Type header, None where there is none."""
        return next((value for name, value in self.headers.items() if name.lower() == "content-type"), None)

    @property
    def query(self) -> str:
        """The query string of the request's path, "" where it has none."""
        return self.request.partition("?")[2].rsplit(" ", 1)[0]

    @property
    def head(self) -> bytes:
        """Request line and header lines, each with its line end."""
        lines = [self.request, *(f"{name}: {value}" for name, value in self.headers.items())]
        return "".join(f"{line}\r\n" for line in lines).encode("latin-1", "replace")

    @classmethod
    def from_head(cls, head: bytes, body: bytes, status: int | None = None, answer: bytes = b"") -> RecordedRequest:
        """Returns a request that a worker has answered, without the headers that say who has asked.

        `status` is None where its answer is not to be compared.
        """
        line, *rest = head.decode("latin-1").split("\r\n")
        pairs = (each.partition(":")[::2] for each in rest if ":" in each)
        headers = {name: value.strip(" \t") for name, value in pairs if name.lower() not in _SECRET_HEADERS}
        return cls(line, headers, body, status, answer)

    def to_line(self) -> str:
        """Returns it as a line, with its line end."""
        fields: dict[str, Any] = {"request": self.request, "headers": dict(self.headers), **_named("body", self.body)}
        if self.status is not None:
            fields |= {"status": self.status, **_named("answer", self.answer)}
        return json.dumps(fields, ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RecordedRequest:
        """Returns what a line says.

        Raises:
            ValueError: it is no JSON object, or a field is not of its type.
        """
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        headers, status = fields.get("headers") or {}, fields.get("status")
        request = fields.get("request", _REQUEST_LINE)
        if not isinstance(headers, dict) or not isinstance(request, str) or not isinstance(status, int | None):
            raise ValueError('"request" is a text, "headers" an object, "status" a number')
        texts = {str(name): str(value) for name, value in headers.items()}
        return cls(request, texts, _bytes_of(fields, "body"), status, _bytes_of(fields, "answer"))


def _named(name: str, content: bytes) -> dict[str, str]:
    try:
        return {name: content.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(content).decode("ascii")}


def _bytes_of(fields: Mapping[str, Any], name: str) -> bytes:
    """Returns the bytes that a line names; what stands there as an object or a list is taken as JSON."""
    encoded = fields.get(f"{name}_base64")
    if encoded is not None:
        return base64.b64decode(encoded, validate=True)
    value = fields.get(name, "")
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8")


def read_recording(path: Path) -> Iterator[RecordedRequest]:
    """Yields the requests of a file, in order; empty lines are skipped.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is wrong; the text names file and line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield RecordedRequest.from_line(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


def named_requests(
    files: Sequence[str], texts: Sequence[str], headers: Sequence[str], content_type: str | None
) -> list[RecordedRequest]:
    """Returns the requests that a command line names, one for each file and each text, of JSON.

    `headers` (`Name: value`) are for all of them, and `content_type` in place of those guessed by the files' names.

    Raises:
        ValueError: a header without a colon.
        OSError: a file cannot be read.
    """
    common = {}
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon:
            raise ValueError(f"--header {header!r}: write it as 'Name: value'")
        common[name.strip()] = value.strip()
    bodies = [(Path(name).read_bytes(), mimetypes.guess_type(name)[0]) for name in files]
    bodies += [(text.encode("utf-8"), "application/json") for text in texts]
    requests = []
    for body, guessed in bodies:
        typed = content_type or guessed
        requests.append(RecordedRequest(headers={**common, "Content-Type": typed} if typed else common, body=body))
    return requests


class Recorder:
    """Appends the first requests that a worker answers, so many, to a file, which all workers of a model may share."""

    def __init__(self, path: Path, requests: int) -> None:
        self._path = path
        self._left = requests

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Recorder | None:
        """Returns the recorder that `handler: record: {file: …, requests: 100}` asks for; None where nothing does."""
        section = config.get("handler")
        asked = section.get("record") if isinstance(section, dict) else None
        if asked is None:
            return None
        requests = asked.get("requests", DEFAULT_REQUESTS) if isinstance(asked, dict) else 0
        if not isinstance(asked, dict) or not isinstance(asked.get("file"), str) or type(requests) is not int:
            log.warning("handler.record: needs a file, and may have a number of requests; nothing is recorded")
            return None
        log.warning(
            "handler.record: the first %d requests are written to %s, with their bodies", requests, asked["file"]
        )
        return cls(Path(asked["file"]), requests)

    @property
    def is_done(self) -> bool:
        """True once nothing more is written."""
        return self._left <= 0

    def put(self, requests: list[RecordedRequest]) -> None:
        """Writes requests; a file that cannot be written ends the recording with a line in the log."""
        lines = "".join(each.to_line() for each in requests[: self._left])
        self._left -= len(requests)
        try:
            # One write at the end of the file: lines of several workers never mix.
            with open(self._path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(lines.encode("utf-8"))
        except OSError as error:
            log.warning("handler.record: cannot write to %s: %s; nothing more is recorded", self._path, error.strerror)
            self._left = 0
