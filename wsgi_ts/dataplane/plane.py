"""One inference, whatever the transport: find the model, admit, choose the device, read the answer.

`RoutingTable` is a process's copy of what the supervisor published; `Target` is what a path means under it. The web
worker uses them without blocking; `BlockingPlane` is the same for servers with a thread per request.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.client import SlotAnswer, SlotClient
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import ModelWord, RequestFlag, SlotState
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull, free_bytes
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import (
    BadRequest,
    InternalServerError,
    ModelNotFound,
    ModelVersionNotFound,
    OutOfResources,
    RequestTimeout,
    ResourceNotFound,
    ServerError,
    ServiceUnavailable,
)
from wsgi_ts.http.form_field import form_field
from wsgi_ts.http.head import Head
from wsgi_ts.instance.shared_memory import segment_layout
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

_MOST_WARM_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """What the path of a prediction means: the model version, and what the handler is told of the path.

    `error` is set where the request is to be refused; the other fields are then without meaning, except that
    `reads_form` says that the body, if it is a form, may name the model after all. `client_timeout_ms` is how long the
    client waits for its answer, 0 for as long as it takes. `is_continuous` says that the answer is made in a continuous
    batch, `has_sequences` that the request belongs to a sequence (see `DataPlane.sequence_of`).
    """

    model_name: str
    version: str | None
    model: int = -1
    batchers: tuple[int, ...] = ()
    url_path: bytes = b""
    flags: int = 0
    client_timeout_ms: int = 0
    is_continuous: bool = False
    has_sequences: bool = False
    error: ServerError | None = None
    reads_form: bool = False


def prediction_parts(path: str, query: str) -> tuple[str, str | None, str, int] | None:
    """Reads a path as one of the prediction routes.

    Returns:
        Model name, version or None, the rest of the path, RequestFlag bits; None when it is no such route. A model
        name of "" means that the request should have named one.

    Raises:
        ResourceNotFound: a prediction route without a model.
    """
    parts = path.split("/")[1:]
    while parts and not parts[-1]:
        parts.pop()
    if not parts:
        return None
    first = parts[0]
    if first in ("predictions", "explanations"):
        if len(parts) == 1:
            raise ResourceNotFound()
        flags = RequestFlag.URL_PATH | (RequestFlag.EXPLAIN if first == "explanations" else 0)
        return parts[1], parts[2] if len(parts) > 2 else None, "/".join(parts[3:]), flags
    if first == "invocations" and len(parts) == 1:
        names = parse_qs(query, encoding="latin-1").get("model_name", [""])
        return names[0], None, "", RequestFlag.QUERY_ROW | RequestFlag.URL_PATH
    if first == "models" and len(parts) == 3 and parts[2] == "invoke":
        return parts[1], None, "", RequestFlag.QUERY_ROW | RequestFlag.URL_PATH
    if first == "v1" and len(parts) == 3 and parts[1] == "models":
        name, _, verb = parts[2].rpartition(":")
        if verb in ("predict", "explain") and name:
            return name, None, "", RequestFlag.EXPLAIN if verb == "explain" else 0
    elif first == "v2" and len(parts) == 4 and parts[1] == "models" and parts[3] in ("infer", "explain"):
        return parts[2], None, "", RequestFlag.EXPLAIN if parts[3] == "explain" else 0
    elif parts[-1] == "predict" and len(parts) in (2, 3):
        return first, parts[1] if len(parts) == 3 else None, "", RequestFlag.QUERY_ROW | RequestFlag.URL_PATH
    return None


class RoutingTable:
    """What the supervisor has published, read again whenever the board's epoch moves."""

    def __init__(self, run_dir: Path, board: Board) -> None:
        self._path = RunFiles(run_dir).routes
        self._board = board
        self._epoch = -1
        self._unread_epoch = -1
        self._models: dict[str, Any] = {}
        self.healthy = True
        self.draining = False

    def refresh(self) -> None:
        """Reads the published file again if there is a newer one (one load of a shared word if not)."""
        epoch = self._board.epoch
        if epoch == self._epoch:
            return
        try:
            table = json.loads(self._path.read_text(encoding="utf-8"))
        except OSError as error:
            # The routes that are known stay, and this is tried again; a process may be out of descriptors for a while.
            if not isinstance(error, FileNotFoundError) and self._unread_epoch != epoch:
                self._unread_epoch = epoch
                log.error("%s cannot be read: %s; requests go where they went before", self._path, error.strerror)
            return
        self._epoch = epoch
        self._models = table["models"]
        self.healthy = bool(table["healthy"])
        self.draining = bool(table["draining"])

    def target_of(self, head: Head) -> Target | None:
        """What a request asks for; None when it is not a prediction. Call `refresh` first.

        The answer is kept with the head, which the parser keeps for the next request that is worded alike.
        """
        if head.route_epoch != self._epoch:
            head.route = None if head.method == "OPTIONS" else self.target(head.path, head.query)
            head.route_epoch = self._epoch
        target: Target | None = head.route
        return target

    def target(self, path: str, query: str) -> Target | None:
        """What a path means; None when it is not a prediction route. Call `refresh` first."""
        try:
            parts = prediction_parts(path, query)
        except ServerError as error:
            return Target("", None, error=error)
        if parts is None:
            return None
        name, version, rest, flags = parts
        name = _as_text(name)
        if not name:
            at_startup = [each for each, model in self._models.items() if model["startup"]]
            if len(at_startup) != 1:
                return Target("", None, error=BadRequest("Parameter model_name is required."), reads_form=True)
            (name,) = at_startup
        return self.version_target(name, None if version is None else _as_text(version), rest, flags)

    def version_target(self, name: str, version: str | None, rest: str = "", flags: int = 0) -> Target:
        """The target of a request to a named model.

        Args:
            name: the model.
            version: one of its versions, None for the default one.
            rest: what stands behind the version in the path, as latin-1 of UTF-8 bytes.
            flags: RequestFlag bits.
        """
        model = self._models.get(name)
        if model is None:
            return Target(name, version, error=ModelNotFound.named(name))
        wanted = model["default"] if version is None else version
        entry = model["versions"].get(wanted)
        if entry is None:
            return Target(name, version, error=ModelVersionNotFound.named(name, wanted))
        batchers = tuple(int(index) for index, workers in entry["batchers"].items() if workers > 0)
        if not batchers:
            return Target(name, version, error=ServiceUnavailable.no_worker(name, version))
        timeout_ms = entry["client_timeout_ms"]
        if version is not None:
            flags |= RequestFlag.VERSION_NAMED
        modes = entry["continuous"], entry["sequences"]
        return Target(name, version, entry["index"], batchers, rest.encode("latin-1"), flags, timeout_ms, *modes)

    def form_target(self, content_type: bytes, body: bytes) -> Target:
        """The target of an `/invocations` request whose model is named by a field of its form."""
        name = form_field(content_type, body, "model_name")
        if not name:
            return Target("", None, error=BadRequest("Parameter model_name is required."))
        return self.version_target(name, None, flags=RequestFlag.QUERY_ROW | RequestFlag.URL_PATH)

    def versions(self, name: str) -> tuple[str, dict[str, bool]]:
        """A model's default version, and of each of its versions whether a worker is ready.

        Raises:
            ModelNotFound: no such model.
        """
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound.named(name)
        return model["default"], {version: entry["loaded"] for version, entry in model["versions"].items()}


def _as_text(part: str) -> str:
    """A path segment as text: WSGI hands it on as latin-1 of UTF-8 bytes."""
    return part.encode("latin-1").decode("utf-8", "replace")


class RequestIds:
    """UUIDs for requests, made by counting: version-4 form, 74 random bits for the process, 48 counted ones."""

    def __init__(self) -> None:
        self._prefix = str(uuid.uuid4())[:24]
        self._next = int.from_bytes(os.urandom(5), "big")

    def new(self) -> str:
        """A request id that no other process or request has."""
        self._next += 1
        return f"{self._prefix}{self._next & 0xFFFFFFFFFFFF:012x}"


class Ticket:
    """A finished (or streaming, or refused) request, as the WSGI app gets it in `wsgi_ts.ticket`.

    Exactly one of `error` and `status` counts. `body` is bytes or a view into the slot; `stream` is set instead for a
    streamed answer.
    """

    __slots__ = ("body", "error", "headers", "phrase", "status", "stream")

    def __init__(self, error: ServerError | None = None) -> None:
        self.error = error
        self.status = 200
        self.phrase = ""
        self.headers: list[tuple[str, str]] = []
        self.body: bytes | memoryview = b""
        self.stream: Iterator[bytes] | None = None


def ticket_of(answer: SlotAnswer, target: Target) -> Ticket:
    """The ticket for an answer that lies in a slot."""
    if answer.error:
        return Ticket(_error_of(answer, target))
    ticket = Ticket()
    ticket.status = answer.status
    ticket.phrase = answer.phrase
    ticket.headers = answer.headers
    ticket.body = answer.body
    return ticket


def _error_of(answer: SlotAnswer, target: Target) -> ServerError:
    text = str(answer.body, "utf-8", "replace")
    if answer.status == ServiceUnavailable.http_status and not text:
        return ServiceUnavailable.no_worker(target.model_name, target.version)
    if answer.status == RequestTimeout.http_status:
        return RequestTimeout(text)
    if answer.status == BadRequest.http_status:
        return BadRequest(text)
    return InternalServerError(text, status=answer.status)


def header_value(head: bytes, name: bytes) -> bytes:
    """The value of a header, found by its name in any case; b"" where there is none."""
    wanted = name.lower()
    for line in head.split(b"\r\n")[1:]:
        found, _, value = line.partition(b":")
        if found.lower() == wanted:
            return value.strip(b" \t")
    return b""


def warm_bytes(config: Config) -> int:
    """How much reserved memory the free slots of one web worker may keep for the next large body."""
    if config.shm_warm_bytes:
        return config.shm_warm_bytes // max(1, config.web_workers)
    return min(_MOST_WARM_BYTES, free_bytes() // 8)


class DataPlane:
    """What one process needs to submit requests: board, routing table, and a segment of its own."""

    def __init__(self, config: Config, run_dir: Path, prefix: str) -> None:
        self.config = config
        self.board = Board.attach(prefix)
        self.routes = RoutingTable(run_dir, self.board)
        self.ids = RequestIds()
        control = ControlPlane(run_dir)
        try:
            reply = control.call("new_segment", pid=os.getpid())
            index = reply["index"]
            batchers = reply["batchers"]
            self.segment = Segment.create(prefix, index, segment_layout(config, batchers))
        except BaseException:
            # The process may go on without, and try again.
            control.close()
            self.board.close()
            raise
        self.bell: Doorbell = self.segment.bell(prefix)
        self.client = SlotClient(self.segment, self.board, batchers, warm_bytes(config))
        self.web_row = self.board.web_row(index)
        self._chosen = 0
        names = config.ts_header_key_sequence_id, config.ts_header_key_sequence_start
        self._sequence_headers = names[0].encode("latin-1"), names[1].encode("latin-1")
        control.call("segment_ready", index=index)
        control.close()
        self.routes.refresh()

    def sequence_of(self, head: bytes) -> tuple[bytes, bytes]:
        """The id of the sequence that a request belongs to, and its head; without an id it begins one.

        Args:
            head: the request's head as received.
        """
        id_name, start_name = self._sequence_headers
        key = header_value(head, id_name)
        if not key:
            key = f"ts-seq-{uuid.uuid4()}".encode()
            head = b"%b%b: %b\r\n\r\n" % (head[:-2], id_name, key)
            if not header_value(head, start_name):
                head = b"%b%b: true\r\n\r\n" % (head[:-2], start_name)
        return key, head

    def choose(self, target: Target, sequence: bytes = b"") -> int:
        """The batcher for a request: the one with the fewest outstanding requests per ready worker.

        All requests of a sequence go to the same one, as long as it has workers.
        """
        batchers = target.batchers
        if len(batchers) == 1:
            return batchers[0]
        if sequence:  # by rendezvous hashing: another one that comes or goes moves only the sequences it gets or had
            return max(batchers, key=lambda batcher: blake2b(sequence, digest_size=8, salt=b"%d" % batcher).digest())
        words = self.board.words
        self._chosen += 1
        best, best_load = -1, float("inf")
        for offset in range(len(batchers)):  # starts with another one each time, so that equals take turns
            batcher = batchers[(self._chosen + offset) % len(batchers)]
            row = self.board.model_row(batcher, target.model)
            outstanding = words[row + ModelWord.OUTSTANDING] + self.client.unpublished(batcher)
            load = (outstanding + 1) / max(words[row + ModelWord.READY_WORKERS], 1e-3)
            if load < best_load:
                best, best_load = batcher, load
        return best


class BlockingPlane:
    """The data plane for WSGI servers with a thread per request (gunicorn's gthread).

    One thread waits on the segment's doorbell and wakes the threads whose requests are answered.
    """

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._lock = threading.Lock()
        #: Who waits for a slot; None where nobody does any more, so that `_watch` gives it back.
        self._waiting: dict[int, threading.Event | None] = {}
        threading.Thread(target=self._watch, name="doorbell", daemon=True).start()

    def predict(
        self,
        target: Target,
        request_id: str,
        head: bytes,
        content_type: bytes,
        body: bytes,
        limit_s: float | None = None,
    ) -> Ticket:
        """Submits a request and waits for its answer; errors come back in the ticket.

        Args:
            target: where it goes.
            request_id: 36 ASCII characters.
            head: the request's head, for the handler.
            content_type: of the body, empty for none.
            body: the body.
            limit_s: seconds to wait at most, besides the model's own `clientTimeoutInMills`; then the error is a
                RequestTimeout, and what has not begun is never run.
        """
        if target.error is not None:
            return Ticket(target.error)
        plane = self._plane
        client = plane.client
        sequence = b""
        if target.has_sequences:
            sequence, head = plane.sequence_of(head)
        event = threading.Event()
        with self._lock:
            slot = client.take(target.model)
            if slot is None:
                return Ticket(ServiceUnavailable.no_slot(target.model_name, target.version))
            self._waiting[slot] = event
            try:
                client.submit(
                    slot,
                    target.model,
                    plane.choose(target, sequence),
                    request_id.encode(),
                    head,
                    target.url_path,
                    content_type,
                    body,
                    len(body),
                    target.flags,
                    time.monotonic_ns(),
                    layout.NOT_RETURNING,
                    sequence,
                )
            except SharedMemoryFull as full:
                del self._waiting[slot]
                client.abandon(slot)
                log.error("%s", full)
                return Ticket(OutOfResources("Not enough shared memory for the request"))
            client.publish()
        limits = [limit_s, target.client_timeout_ms / 1000 or None]
        event.wait(min((limit for limit in limits if limit is not None), default=None))
        with self._lock:
            if not event.is_set():
                client.cancel(slot)
                self._waiting[slot] = None
                return Ticket(RequestTimeout(layout.TOO_LATE))
            answer = client.answer(slot)
        if answer.streamed:
            ticket = Ticket()
            ticket.status, ticket.phrase, ticket.headers = answer.status, answer.phrase, answer.headers
            ticket.stream = self._stream(slot)
            return ticket
        ticket = ticket_of(answer, target)
        ticket.body = bytes(ticket.body)
        with self._lock:
            del self._waiting[slot]
            client.release(slot)
        return ticket

    def _stream(self, slot: int) -> Iterator[bytes]:
        client = self._plane.client
        event = self._waiting[slot]
        if event is None:
            raise RuntimeError("a stream that nobody waits for")
        state: int = SlotState.STREAMING
        try:
            while state == SlotState.STREAMING:
                with self._lock:
                    event.clear()
                    state = client.state(slot)
                    chunks = client.read_stream(slot)
                yield from (chunk for chunk in chunks if chunk)
                if state == SlotState.STREAMING:
                    event.wait(1.0)
            if state == SlotState.FAILED:
                raise ConnectionError("the handler failed while it streamed its answer")
        finally:
            with self._lock:
                if state == SlotState.STREAMING:  # the client has gone: the slot is freed when its worker has ended it
                    client.cancel(slot)
                    self._waiting[slot] = None
                else:
                    del self._waiting[slot]
                    client.release(slot)

    def _watch(self) -> None:
        bell, client = self._plane.bell, self._plane.client
        while True:
            bell.fall_asleep()
            bell.sleep(1.0)
            try:
                self._plane.routes.refresh()
                with self._lock:
                    for slot in client.answered():
                        self._notice(slot)
            except Exception:  # the next ring is heard all the same
                log.exception("The answers of a turn cannot be looked after")

    def _notice(self, slot: int) -> None:
        """Wakes whoever waits for an answered slot, or gives it back where nobody does. Call with the lock held."""
        if slot not in self._waiting:
            return
        event, client = self._waiting[slot], self._plane.client
        if event is not None:
            event.set()
        elif client.state(slot) == SlotState.STREAMING:
            client.read_stream(slot)
        else:
            del self._waiting[slot]
            client.release(slot)
