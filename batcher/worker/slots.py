"""A model worker's side of the segments: reads requests out of slots, writes answers and stream chunks into them.

A slot's state word is written after everything else, so what another process sees is complete whatever becomes of
this one. Payloads are read and written in place; nothing is sent.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Final

from wsgi_ts.batcher.shm import layout, stream, worker_layout
from wsgi_ts.batcher.shm.body_codec import lone_value, unpack_fields, unpack_references
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import ReferenceKind, RequestFlag, SlotState
from wsgi_ts.batcher.shm.mailbox import WorkerMailbox
from wsgi_ts.batcher.shm.request_codec import read_request, write_answer
from wsgi_ts.batcher.shm.segment import Segment, segment_name
from wsgi_ts.batcher.shm.shared_memory import SHM_DIRECTORY, SharedMemoryFull
from wsgi_ts.batcher.shm.worker_layout import Tally
from wsgi_ts.handlers.serving.context import StreamClosed
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.inputs import BadInput, LazyHeaders, Request, build_row
from wsgi_ts.handlers.serving.results import BODYLESS_STATUSES, INVALID_RESPONSE, Answer, Body

#: Content types whose body is given to the handler as it is.
_OPAQUE_TYPES: Final = frozenset((b"", b"application/octet-stream"))
#: Flags that make no difference to what the handler sees.
_FREE_FLAGS: Final = (
    RequestFlag.BODY_OUTSIDE | RequestFlag.HEAD_OUTSIDE | RequestFlag.VERSION_NAMED | RequestFlag.SAMPLED
)
_PLAIN_EXTRA: Final = {"url_path": "", "explain": "False"}
_STATE: Final = layout.STATE_MASK
_NO_STATE: Final = ~_STATE
_UNBEGUN: Final = (SlotState.CLAIMED, SlotState.AGAIN)
#: How long a streaming handler waits at a time while its client's web worker has not yet fetched the last chunks: at
#: first, and at most, where a client reads slowly.
_STREAM_WAIT_S: Final = 0.0005
_LONGEST_STREAM_WAIT_S: Final = 0.008
#: An answer with this status, or one above it, is an error.
_FIRST_ERROR: Final = 400
#: How much of an error's text a client gets, at most.
MOST_ERROR_BYTES: Final = 65536
_FULL: Final = "Not enough shared memory for the response"
_LONG_HEADERS: Final = f"The phrase and headers that the handler has set exceed {layout.ANSWER_HEAD_ROOM} bytes"


def whole_characters(text: bytes | bytearray | memoryview, most: int) -> bytes | bytearray | memoryview:
    """Returns UTF-8 text, cut between two characters where it has more than `most` bytes."""
    return text if len(text) <= most else bytes(text[:most]).decode("utf-8", "ignore").encode()


class SlotReference:
    """Where one request lies.

    Attributes:
        streamed: whether its answer is being streamed.
        sampled: whether its trace is recorded; known once it has been read.
        batch: what its slot is to tell of its batch (`layout.BATCH`).
    """

    __slots__ = ("batch", "sampled", "segment", "slot", "streamed")

    def __init__(self, segment: Segment, slot: int) -> None:
        self.segment = segment
        self.slot = slot
        self.streamed = False
        self.sampled = False
        self.batch = layout.NO_BATCH

    @property
    def entry(self) -> int:
        """The request as a mailbox names it."""
        return worker_layout.mail_entry(self.segment.index, self.slot)

    @property
    def state(self) -> int:
        """The slot's SlotState."""
        return self.segment.states[self.slot] & _STATE

    @property
    def is_cancelled(self) -> bool:
        """Whether the client has gone."""
        return bool(self.segment.cancels[self.slot])

    def set_state(self, state: int) -> None:
        """Stores a SlotState; everything else about the slot has been written before."""
        states = self.segment.states
        states[self.slot] = states[self.slot] & _NO_STATE | state


class WorkerSlots:
    """The segments that a model worker has attached, and what it does with their slots.

    Args:
        decode_input_request: whether handlers get text and JSON decoded.
        mailbox: where requests are counted that have gone another way than most; None: nowhere.
        timeout_ms: the model's `clientTimeoutInMills`; 0 for none.

    Attributes:
        has_sampled: the trace of a request that was accepted last is recorded.
        has_describe: a request that was accepted last asks for a description.
    """

    def __init__(
        self, prefix: str, decode_input_request: bool, mailbox: WorkerMailbox | None = None, timeout_ms: int = 0
    ) -> None:
        self._prefix = prefix
        self.has_sampled = self.has_describe = False
        self._mailbox = mailbox
        self._timeout_ns = timeout_ms * 1_000_000
        self._decode = decode_input_request
        self._segments: dict[int, Segment] = {}
        self._bells: dict[int, Doorbell] = {}

    def ref(self, entry: int) -> SlotReference | None:
        """Returns where a request lies; None when its web worker has died and taken the memory along."""
        index, slot = worker_layout.split_mail_entry(entry)
        segment = self._segments.get(index) or self._attach(index)
        return None if segment is None else SlotReference(segment, slot)

    def ring(self, segment_index: int) -> None:
        """Wakes the web worker that owns a segment."""
        bell = self._bells.get(segment_index)
        if bell is not None:
            bell.ring()

    def ring_owners(self, entries: list[int]) -> None:
        """Wakes the web workers that own the slots of these entries, each once."""
        if len(entries) == 1:
            self.ring(worker_layout.split_mail_entry(entries[0])[0])
            return
        for index in {worker_layout.split_mail_entry(entry)[0] for entry in entries}:
            self.ring(index)

    def forget_dead(self) -> None:
        """Lets go of segments whose owner has died: their names are gone, the pages go with the last mapping."""
        for index in [index for index in self._segments if not _exists(self._prefix, index)]:
            self._segments.pop(index).close()
            self._bells.pop(index).close()

    def accept(self, entries: list[int], oldest_ns: int) -> tuple[list[SlotReference], list[Request]]:
        """Reads the requests of a batch; those that are not to be run are answered here.

        Requests that arrived before `oldest_ns` (monotonic) are too late; 0 for no limit.

        Returns:
            The refs and the requests to run, in the same order. Their state is still CLAIMED.
        """
        refs: list[SlotReference] = []
        requests: list[Request] = []
        self.has_sampled = self.has_describe = False
        for entry in entries:
            ref = self.ref(entry)
            if ref is None or ref.state not in _UNBEGUN:
                continue
            segment, slot = ref.segment, ref.slot
            if segment.arrival_ns(slot) < oldest_ns:
                self.count(Tally.EXPIRED)
                segment.fail_late(slot)
            elif segment.cancels[slot]:
                self.count(Tally.CANCELLED)
                segment.fail_cancelled(slot)
            else:
                try:
                    requests.append(self.read(ref))
                except BadInput as error:
                    self.count(Tally.OTHER)
                    segment.fail(slot, 400, str(error))
                else:
                    refs.append(ref)
        return refs, requests

    def begin(self, entries: list[int], oldest_ns: int) -> tuple[list[SlotReference], list[Request]]:
        """As `accept`; what it returns is RUNNING from now on."""
        refs, requests = self.accept(entries, oldest_ns)
        for ref in refs:
            ref.set_state(SlotState.RUNNING)
        return refs, requests

    def read(self, ref: SlotReference) -> Request:
        """Returns the request in a slot.

        Raises:
            BadInput: its body is not what its content type says.
        """
        request_id, flags, head, rest, content_type, body = read_request(ref.segment, ref.slot)
        if flags & RequestFlag.SAMPLED:
            ref.sampled = self.has_sampled = True
        if content_type in _OPAQUE_TYPES and flags & ~_FREE_FLAGS == RequestFlag.URL_PATH and not rest:
            # The common case, without anything to decode: the headers are read if the handler asks for them.
            row: dict[str, Any] = {"body": bytearray(body)}
            return Request(request_id, row, LazyHeaders(head, _PLAIN_EXTRA))
        if flags & RequestFlag.DESCRIBE:
            self.has_describe = True
            return Request(request_id, {}, LazyHeaders(head, {"describe": "True"}, {}), is_describe=True)
        function = ""
        if flags & RequestFlag.FUNCTION:
            function, rest = str(rest, "utf-8"), rest[:0]
        if flags & RequestFlag.FIELDS:
            fields = unpack_fields(body)
            return Request(request_id, fields, LazyHeaders(head, {}, dict.fromkeys(fields, "")), function=function)
        if flags & RequestFlag.REFERENCES:
            values = self._referenced(ref.segment, body)
            return Request(request_id, values, LazyHeaders(head, {}, dict.fromkeys(values, "")), function=function)
        query = ""
        extra: dict[str, str] = {}
        if flags & RequestFlag.URL_PATH:
            extra["url_path"] = str(rest, "utf-8", "replace")
        if flags & RequestFlag.QUERY_ROW:  # as TorchServe: of these routes the handler has the client's headers only
            query = head.split(b"\r\n", 1)[0].partition(b"?")[2].rsplit(b" ", 1)[0].decode("latin-1")
        else:
            extra["explain"] = "True" if flags & RequestFlag.EXPLAIN else "False"
        types: dict[str, str] = {}
        declared = content_type.decode("latin-1") if content_type else None
        row = build_row(declared, body, decode=self._decode, query=query, types=types)
        return Request(request_id, row, LazyHeaders(head, extra, types), function=function)

    def _referenced(self, segment: Segment, body: memoryview) -> dict[str, Any]:
        """The row of a workflow's node: what the nodes before it have answered, copied from where that lies."""
        lone = lone_value(body)
        if lone is not None:
            name, start, size = lone
            return {name: bytearray(segment.buffer[start : start + size])}
        row: dict[str, Any] = {}
        for key, kind, offset, length, inline in unpack_references(body):
            if kind == ReferenceKind.VALUE:
                row[key] = bytearray(segment.buffer[offset : offset + length])
            elif kind == ReferenceKind.ELEMENT:
                row.setdefault(key, []).append(bytearray(segment.buffer[offset : offset + length]))
            elif kind == ReferenceKind.NO_ELEMENT:
                row.setdefault(key, []).append(None)
            elif kind == ReferenceKind.NO_ELEMENTS:
                row[key] = []
            elif kind == ReferenceKind.REQUEST:
                fields = self.read(SlotReference(segment, offset)).row
                row.update({f"{key}.{name}": value for name, value in fields.items()})
            elif kind == ReferenceKind.INLINE_ELEMENT:
                row.setdefault(key, []).append(bytearray(inline))
            else:
                row[key] = bytearray(inline)
        return row

    def count(self, tally: int) -> None:
        """Counts a request, one of Tally. Before its slot says that it has ended: its client may look at once."""
        if self._mailbox is not None:
            self._mailbox.count(tally)

    def count_end(self, ref: SlotReference, answer: Answer, ended: int) -> None:
        """Counts a request that the handler has answered, where that is of no use or an error.

        `ended` is when the handler returned (monotonic ns).
        """
        segment, slot = ref.segment, ref.slot
        if segment.cancels[slot]:
            # The web worker gives up a request that is too late as it does one whose client has gone.
            is_late = self._timeout_ns and ended - segment.arrival_ns(slot) >= self._timeout_ns
            self.count(Tally.LATE if is_late else Tally.LEFT)
        elif answer.error or answer.status >= _FIRST_ERROR:
            self.count(Tally.HANDLER_ERRORS)

    def end_cancelled(self, ref: SlotReference) -> None:
        """Ends a request whose client has gone while the handler had it."""
        self.count(Tally.LEFT)
        ref.segment.fail_cancelled(ref.slot)

    def send_chunk(self, ref: SlotReference, answer: Answer, started: int) -> None:
        """Sends one chunk of a streamed answer; the first one sends status and headers.

        `started` is when the request's batch was begun (monotonic ns).

        Raises:
            StreamClosed: the client has gone.
            SharedMemoryFull: /dev/shm has no room for the stream's ring.
            PredictionException: phrase and headers are too long, or the status has no body.
        """
        self._put_chunk(ref, answer, started)
        self._bells[ref.segment.index].ring()

    def send_part(self, ref: SlotReference, answer: Answer, started: int) -> bool:
        """Sends an answer that is to go on as a chunk, without waking anybody yet.

        `started` is when the step was begun (monotonic ns).

        Returns:
            False if the request has ended with it after all: its client has gone, or there is no memory.
        """
        try:
            self._put_chunk(ref, answer, started)
        except StreamClosed:
            self.end_cancelled(ref)
        except SharedMemoryFull as full:
            print(f"{full}", file=sys.stderr)
            self.count(Tally.OTHER)
            ref.segment.fail(ref.slot, 507, _FULL)
        except PredictionException as error:
            self.count(Tally.HANDLER_ERRORS)
            ref.segment.fail(ref.slot, error.error_code, error.message)
        else:
            return True
        return False

    def _put_chunk(self, ref: SlotReference, answer: Answer, started: int) -> None:
        if ref.streamed:
            self._push(ref, answer.body)
        else:
            self.open_stream(ref, answer, started)
            self._push(ref, answer.body)
            ref.set_state(SlotState.STREAMING)

    def open_stream(self, ref: SlotReference, answer: Answer, started: int) -> None:
        """Writes the head of a streamed answer; once the first chunk is in its ring, the state may say STREAMING.

        Raises:
            SharedMemoryFull: /dev/shm has no room for the stream's ring.
            PredictionException: phrase and headers are too long, or the status has no body.
        """
        if answer.status in BODYLESS_STATUSES:  # a client would read the stream as its next answer
            raise PredictionException(INVALID_RESPONSE, 500)
        stream.open_ring(ref.segment, ref.slot)
        times = started, 0
        try:
            write_answer(ref.segment, ref.slot, times, answer.status, answer.phrase, answer.headers, None, ref.batch)
        except ValueError as error:
            raise PredictionException(_LONG_HEADERS, 500) from error
        ref.streamed = True

    def _push(self, ref: SlotReference, body: Body) -> None:
        """Puts a chunk into the stream's ring, in pieces where it is larger than the ring."""
        segment, slot = ref.segment, ref.slot
        is_told = False
        for piece in stream.pieces_of(body):
            wait_s = _STREAM_WAIT_S
            while not stream.try_push(segment, slot, piece):
                if segment.cancels[slot] or not _exists(self._prefix, segment.index):
                    raise StreamClosed("the client has closed the connection")
                if not is_told:  # once: that the ring is still full is no news to its reader
                    self._bells[segment.index].ring()
                    is_told = True
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_STREAM_WAIT_S)
            is_told = False
        if segment.cancels[slot]:
            raise StreamClosed("the client has closed the connection")

    def write(self, ref: SlotReference, answer: Answer, started: int, ended: int) -> None:
        """Writes an answer, or ends the stream that it is the last chunk of.

        `started` and `ended` are when its batch was begun and the handler returned (monotonic ns).
        """
        segment, slot = ref.segment, ref.slot
        if ref.streamed:
            self._end_stream(ref, answer, ended)
            return
        self.count_end(ref, answer, ended)
        status, phrase, headers, body, error = answer
        if error:
            body = whole_characters(body, min(MOST_ERROR_BYTES, segment.layout.response_range))
        times = started, ended
        try:
            write_answer(segment, slot, times, status, phrase, headers, body, ref.batch)
        except SharedMemoryFull as full:
            print(f"{full}", file=sys.stderr)
            self.count(Tally.OTHER)
            segment.fail(slot, 507, _FULL)
            return
        except ValueError:
            self.count(Tally.HANDLER_ERRORS)
            write_answer(segment, slot, times, 500, "", [], _LONG_HEADERS.encode(), ref.batch)
            error = True
        ref.set_state(SlotState.FAILED if error else SlotState.DONE)

    def write_all(self, refs: list[SlotReference], answers: list[Answer], started: int, ended: int) -> None:
        """Writes the answers of a batch."""
        for place, ref in enumerate(refs):
            self.write(ref, answers[place], started, ended)

    def leave(self, ref: SlotReference, answer: Answer, started: int, ended: int) -> None:
        """Writes an error for the batcher to answer with, should the request not run again; the state stays RUNNING."""
        body = whole_characters(answer.body, layout.RESPONSE_INLINE_BYTES)
        write_answer(ref.segment, ref.slot, (started, ended), answer.status, "", [], body, ref.batch)

    def _end_stream(self, ref: SlotReference, answer: Answer, ended: int) -> None:
        """The final result is the last chunk; an error ends the stream unfinished."""
        state = SlotState.FAILED if answer.error else SlotState.DONE
        if not answer.error:
            try:
                self._push(ref, answer.body)
            except StreamClosed:
                state = SlotState.FAILED
        self.count_end(ref, answer, ended)
        ref.set_state(state)

    def _attach(self, index: int) -> Segment | None:
        try:
            segment = Segment.attach(self._prefix, index)
            self._bells[index] = segment.bell(self._prefix)
        except FileNotFoundError:
            return None
        self._segments[index] = segment
        self.forget_dead()
        return segment


def _exists(prefix: str, index: int) -> bool:
    return (SHM_DIRECTORY / segment_name(prefix, index)).exists()
