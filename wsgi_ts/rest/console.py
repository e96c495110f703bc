"""The console and its data: the page, a snapshot of the server, the settings, and a way to the inference API.

The pages are there for everybody, like the API description; all else takes the management token. What the console does
(scale, unregister, ...) are ordinary calls of the management API.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import ssl
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import falcon

from wsgi_ts.console.page import Page
from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import ServerError, ServiceUnavailable
from wsgi_ts.rest.responses import write_json
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.address import Address

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

#: Where snapshots are sent as events; the web worker goes on with what the app begins.
EVENTS_PATH = "/console/events"
EVENT_TYPE = "text/event-stream"
#: How long the console waits for a prediction that somebody tries, in seconds.
TRY_LIMIT_S = 130.0
#: The header that carries the inference key past the check of the management key.
INFERENCE_KEY = "x-inference-authorization"
#: Headers of a request that are passed on, and of the answer those that are not.
_PASSED = ("content-type", "accept", "x-request-id", "x-request-timeout-ms", "traceparent")
_NOT_PASSED = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive", "content-encoding"})
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class PageResource:
    """One page: `/console` or `/docs`."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _page(self) -> Page:
        """The page: read and compressed when it is asked for, which it never is on most servers."""
        return Page.load(self._name)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with the page, compressed where the browser takes that."""
        for name, value in self._page.headers.items():
            resp.set_header(name, value)
        if "gzip" in (req.get_header("accept-encoding") or ""):
            resp.set_header("content-encoding", "gzip")
            resp.data = self._page.packed
        else:
            resp.data = self._page.html


class ConsoleData:
    """What the console shows of the server: `/console/data`, `/console/events` and `/console/settings`."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with one snapshot of everything that may change."""
        resp.set_header("content-type", "application/json")
        _, text = _snapshot(self._control)
        resp.data = text.encode()

    def on_get_events(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with the first of many events; a server that cannot go on leaves it to the page to ask again."""
        resp.set_header("content-type", EVENT_TYPE)
        resp.data = b"retry: 1000\n" + snapshot_event(self._control).data

    def on_get_settings(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with the settings, their sources, and what the doctor would say."""
        write_json(resp, 200, self._control.call("console_settings", timeout_s=QUICK_CALL_S))


class TuneResults:
    """`/console/tune`: what `wsgi-ts tune` has left of each model."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = RunFiles(run_dir).tune

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with the newest result of each model; one that cannot be read is left out, and the log says why."""
        found = []
        for path in sorted(self._folder.glob("[!.]*.json")):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                log.warning("%s: cannot be read as a result of wsgi-ts tune: %s", path, error)
        write_json(resp, 200, {"results": found})


class InferenceCalls:
    """`/console/inference/…`: a request to this server's own inference API, which a page of another port cannot ask."""

    def __init__(self, instance: Instance) -> None:
        self._address = instance.config.inference_address

    def on_request(self, req: falcon.Request, resp: falcon.Response, rest: str) -> None:
        """Passes the request on, and its answer back.

        Raises:
            ServerError: the inference API does not answer.
        """
        headers = {name: value for name in _PASSED if (value := req.get_header(name)) is not None}
        key = req.get_header(INFERENCE_KEY)
        if key:
            headers["authorization"] = key
        path = req.env.get("RAW_URI") or req.relative_uri
        target = "/" + path.partition("/console/inference/")[2]
        body = (req.stream if req.env.get("wsgi.input_terminated") else req.bounded_stream).read()
        connection = _connection(self._address)
        try:
            connection.request(req.method, target, body=body or None, headers=headers)
            answer = connection.getresponse()
            resp.data = answer.read()
        except TimeoutError as error:
            raise ServerError(f"No answer within {TRY_LIMIT_S:g} s.", status=504) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnavailable(f"The inference API at {self._address} does not answer: {error}") from error
        finally:
            connection.close()
        resp.status = answer.status
        for name, value in answer.getheaders():
            if name.lower() not in _NOT_PASSED:
                resp.set_header(name, value)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TRY_LIMIT_S)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(address: Address) -> http.client.HTTPConnection:
    """A connection to an address that this server itself listens on."""
    if address.scheme == "unix":
        return _UnixConnection(address.path)
    host = _ANY_HOST.get(address.host, address.host)
    if not address.is_tls:
        return http.client.HTTPConnection(host, address.port, timeout=TRY_LIMIT_S)
    # The certificate names the host that clients know, and this is this machine.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, address.port, timeout=TRY_LIMIT_S, context=context)


class SnapshotEvent(NamedTuple):
    """A snapshot as a server-sent event.

    Attributes:
        data: what is sent.
        since: the revision that a viewer must have who understands it; 0: any.
        revision: what a viewer has who has got it; 0: no more than before.
    """

    data: bytes
    since: int
    revision: int


def snapshot_event(control: ControlPlane, since: int = 0) -> SnapshotEvent:
    """What has changed since a revision; where the supervisor does not answer, an event that says so."""
    try:
        revision, text = _snapshot(control, since)
    except ServerError as error:
        return SnapshotEvent(_event("unavailable", json.dumps(error.to_dict())), 0, 0)
    return SnapshotEvent(_event("snapshot", text), since, revision)


def _snapshot(control: ControlPlane, since: int = 0) -> tuple[int, str]:
    """The revision of a snapshot, and the snapshot as JSON."""
    revision, _, text = control.call("console_snapshot", timeout_s=QUICK_CALL_S, since=since).partition(" ")
    return int(revision), text


def _event(kind: str, data: str) -> bytes:
    return f"event: {kind}\ndata: {data}\n\n".encode()


def add_routes(app: falcon.App[Any, Any], instance: Instance, control: ControlPlane) -> None:
    """Gives `app`, that of a management (or combined) listener, the console."""
    data = ConsoleData(control)
    app.add_route("/console", PageResource("console"))
    app.add_route("/console/data", data)
    app.add_route(EVENTS_PATH, data, suffix="events")
    app.add_route("/console/settings", data, suffix="settings")
    app.add_route("/console/tune", TuneResults(instance.run_dir))
    app.add_route("/console/inference/{rest:path}", InferenceCalls(instance))
