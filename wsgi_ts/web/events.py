"""The events of a workflow for a client that asks for them: server-sent events (WHATWG HTML, 9.2), as bytes."""

from __future__ import annotations

import base64
import json
from urllib.parse import parse_qs

from wsgi_ts.dataplane.exchange import header_value
from wsgi_ts.dataplane.task import STATE_NAMES
from wsgi_ts.errors import ServerError
from wsgi_ts.http.head import Head

EVENT_TYPE = "text/event-stream"


def wants_events(head: Head) -> bool:
    """Whether a request asks to be told of each node: by `Accept: text/event-stream`, or by `?events=true`."""
    if EVENT_TYPE.encode() in header_value(head.raw, b"accept").lower():
        return True
    return "events" in head.query and parse_qs(head.query).get("events", [""])[-1].lower() == "true"


def node_event(name: str, item: int, took_ns: int, state: int) -> bytes:
    """A node has ended as its `task.State` says.

    `item` is the number of the list's element that it has run for, -1 where it runs once.
    """
    fields: dict[str, object] = {"node": name, "state": STATE_NAMES[state]}
    fields["ms"] = round(took_ns / 1e6, 3)
    if item >= 0:
        fields["item"] = item
    return _event("node", json.dumps(fields, ensure_ascii=False))


def body_event(kind: str, body: bytes) -> bytes:
    """The workflow's answer (`answer`), or a chunk of it (`chunk`); what is no text, in base64 (`answer-base64`)."""
    try:
        return _event(kind, body.decode())
    except UnicodeDecodeError:
        return _event(f"{kind}-base64", base64.b64encode(body).decode())


def error_event(error: ServerError) -> bytes:
    """There is no answer, and why."""
    return _event("error", json.dumps(error.to_dict(), ensure_ascii=False))


def _event(kind: str, data: str) -> bytes:
    # Each of the three line ends of the format would end a line of the data.
    lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return (f"event: {kind}\n" + "".join(f"data: {line}\n" for line in lines) + "\n").encode("utf-8", "replace")
