"""A model worker: loads one handler, then takes batches from its mailbox and writes answers into the slots.

Runs in: a fork of the worker template (`run`), or an interpreter of its own (`python -m wsgi_ts.batcher.worker`).
This is the only module of the data path that imports `handlers`. The handler is user code: it may raise, exit, print
or hang; what is in shared memory stays consistent because a slot's state word is written after everything else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.board import Board
from wsgi_ts.batcher.client import encode_headers
from wsgi_ts.batcher.doorbell import Doorbell
from wsgi_ts.batcher.layout import RequestFlag, ResponseFlag, SlotState
from wsgi_ts.batcher.mailbox import WorkerMailbox, mailbox_name
from wsgi_ts.batcher.segment import Segment, segment_name
from wsgi_ts.batcher.shared_memory import SHM_DIRECTORY, SharedMemoryFull
from wsgi_ts.channel import Channel
from wsgi_ts.handlers.context import StreamClosed
from wsgi_ts.handlers.inputs import BadInput, LazyHeaders, build_row
from wsgi_ts.handlers.service import Answer, LoadError, Request, Service, configure_logging
from wsgi_ts.messages import ModelSpec

_SLOT_MASK = 0xFFFFFFFF
#: Content types whose body is given to the handler as it is.
_OPAQUE_TYPES = frozenset((b"", b"application/octet-stream"))
#: Flags that make no difference to what the handler sees.
_FREE_FLAGS = RequestFlag.BODY_OUTSIDE | RequestFlag.HEAD_OUTSIDE
_PLAIN_EXTRA = {"url_path": "", "explain": "False"}
_NO_STATE = ~0xFF
#: How long a streaming handler waits at a time while its client's web worker has not yet fetched the last chunks.
_STREAM_WAIT_S = 0.0005
#: A worker whose last batch came within SOON_NS and held at most FEW requests looks actively for
#: the next one, for LOOK_NS, before it sleeps.
SOON_NS = 500_000
LOOK_NS = 200_000
FEW = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_HEAP_BLOCK = 32 * 1024 * 1024
_KEPT_HEAP_BYTES = 64 * 1024 * 1024
_FULL = "Not enough shared memory for the response"


class _Place:
    """Where one request of the current batch lies."""

    __slots__ = ("segment", "slot", "streamed")

    def __init__(self, segment: Segment, slot: int) -> None:
        self.segment = segment
        self.slot = slot
        self.streamed = False


class ModelWorker:
    """Serves the batches of one mailbox with one loaded handler."""

    def __init__(self, spec: ModelSpec, prefix: str, mailbox: WorkerMailbox, batcher_bell: Doorbell) -> None:
        self._spec = spec
        self._prefix = prefix
        self._mailbox = mailbox
        self._batcher_bell = batcher_bell
        self._segments: dict[int, Segment] = {}
        self._bells: dict[int, Doorbell] = {}
        self._places: list[_Place] = []
        self._service: Service | None = None
        self._started_ns = 0
        self._last_wait_ns = SOON_NS
        self._last_count = 0

    @property
    def must_restart(self) -> bool:
        """True once the handler's device is broken, so that a new process is needed."""
        return self._service is not None and self._service.must_restart

    def load(self, gpu_id: int | None) -> None:
        """Imports and initialises the handler (see `Service.load` for what it raises)."""
        self._service = Service.load(self._spec, gpu_id, self.send_chunk, metrics_sink=_print_metrics)

    def close(self) -> None:
        """Ends what the handler's service keeps."""
        if self._service is not None:
            self._service.close()

    def serve(self) -> None:
        """Takes batches until the mailbox says stop, or the handler has broken its device for good."""
        mailbox = self._mailbox
        service = self._service
        if service is None:
            raise RuntimeError("serve() before load()")
        number = 0
        while not service.must_restart:
            if not self._wait_for(number + 1):
                return
            number += 1
            started = time.monotonic_ns()
            entries = mailbox.begin(number, started)
            if entries is not None:
                self._started_ns = started
                self._last_count = len(entries)
                self._run_batch(service, entries)
            mailbox.finish(number, time.monotonic_ns() - started)
            self._batcher_bell.ring(layout.News.COMPLETION)

    def _wait_for(self, number: int) -> bool:
        """Waits until a batch is posted; False when there will be none."""
        mailbox = self._mailbox
        bell = mailbox.bell
        idle_since = time.monotonic_ns()
        if self._last_wait_ns < SOON_NS and self._last_count <= FEW:
            self._look_for(number, idle_since + LOOK_NS)
        while mailbox.posted() < number:
            if mailbox.stopping:
                return False
            bell.fall_asleep()
            if mailbox.posted() < number and not mailbox.stopping:
                bell.sleep(1.0)
                if mailbox.posted() < number:
                    self._forget_dead_segments()
            bell.wake_up()
        self._last_wait_ns = time.monotonic_ns() - idle_since
        return True

    def _look_for(self, number: int, stop_at: int) -> None:
        """Looks actively for the next batch; others that want the core get it.

        Done where the last batch came soon and was small: a few clients wait for each other answer, and being woken
        would be half of their time. Under more load the core is better left to those who make the next batch.
        """
        mailbox, clock = self._mailbox, time.monotonic_ns
        now = clock()
        while mailbox.posted() < number and now < stop_at:
            os.sched_yield()
            now = clock()

    def _run_batch(self, service: Service, entries: list[int]) -> None:
        requests: list[Request] = []
        places = self._places = []
        for entry in entries:
            segment = self._segment(entry >> 32)
            if segment is None:
                continue  # its web worker died and took the memory along; nobody waits
            slot = entry & _SLOT_MASK
            if segment.states[slot] & 0xFF != SlotState.CLAIMED:
                continue
            if segment.cancels[slot]:
                segment.fail_cancelled(slot)
                continue
            try:
                requests.append(self._read(segment, slot))
            except BadInput as error:
                segment.fail(slot, 400, str(error))
                continue
            places.append(_Place(segment, slot))
        for place in places:
            states = place.segment.states
            states[place.slot] = states[place.slot] & _NO_STATE | SlotState.RUNNING
        answers = service.predict(requests) if requests else []
        ended = time.monotonic_ns()
        for place, answer in zip(places, answers, strict=True):
            self._write(place, answer, ended)
        for index in {entry >> 32 for entry in entries}:
            bell = self._bells.get(index)
            if bell is not None:
                bell.ring()

    def _read(self, segment: Segment, slot: int) -> Request:
        base = segment.layout.slot(slot)
        buffer = segment.buffer
        _, body_bytes, _, flags, head_bytes, path_bytes, type_bytes, _, request_id = layout.REQUEST.unpack_from(
            buffer, base
        )
        start = base + layout.REQUEST_INLINE
        if flags & RequestFlag.HEAD_OUTSIDE:
            outside = segment.layout.request_payload(slot)
            head = bytes(buffer[outside : outside + head_bytes])
        else:
            head = bytes(buffer[start : start + head_bytes])
            start += head_bytes
        url_path = str(buffer[start : start + path_bytes], "utf-8", "replace") if path_bytes else ""
        start += path_bytes
        content_type = bytes(buffer[start : start + type_bytes])
        start += type_bytes
        if flags & RequestFlag.BODY_OUTSIDE:
            start = segment.layout.request_payload(slot) + layout.HEAD_ROOM
        body = buffer[start : start + body_bytes]
        if content_type in _OPAQUE_TYPES and flags & ~_FREE_FLAGS == RequestFlag.URL_PATH and not url_path:
            # The common case, without anything to decode: the headers are read if the handler asks for them.
            row: dict[str, Any] = {"body": bytearray(body)}
            return Request(str(request_id, "ascii"), row, LazyHeaders(head, _PLAIN_EXTRA))
        query = ""
        if flags & RequestFlag.QUERY_ROW:
            query = head.split(b"\r\n", 1)[0].partition(b"?")[2].rsplit(b" ", 1)[0].decode("latin-1")
        extra = {"url_path": url_path} if flags & RequestFlag.URL_PATH else {}
        extra["explain"] = "True" if flags & RequestFlag.EXPLAIN else "False"
        if flags & RequestFlag.DESCRIBE:
            extra["describe"] = "True"
        types: dict[str, str] = {}
        declared = content_type.decode("latin-1") if content_type else None
        row = build_row(declared, body, decode=self._spec.decode_input_request, query=query, types=types)
        return Request(str(request_id, "ascii"), row, LazyHeaders(head, extra, types))

    def send_chunk(self, index: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Sends one chunk of a streamed answer (called from inside the handler).

        Raises:
            StreamClosed: the client has gone.
            SharedMemoryFull: /dev/shm has no room for the stream's ring.
        """
        place = self._places[index]
        segment, slot = place.segment, place.slot
        if not place.streamed:
            segment.memory.reserve(segment.layout.response_payload(slot), layout.STREAM_RING_BYTES)
            words = segment.memory.words(segment.layout.slot(slot) + layout.STREAM_WORDS, 2)
            words[0] = words[1] = 0
            meta = phrase.encode("latin-1") + encode_headers(headers)
            header = layout.RESPONSE.pack(
                self._started_ns, 0, 0, status, ResponseFlag.STREAMED, len(phrase), len(meta) - len(phrase)
            )
            segment.write_response(slot, header, meta, b"")
            place.streamed = True
            self._push(place, body)
            segment.states[slot] = segment.states[slot] & _NO_STATE | SlotState.STREAMING
        else:
            self._push(place, body)
        self._bells[segment.index].ring()

    def _push(self, place: _Place, body: bytes | bytearray | memoryview) -> None:
        """Puts a chunk into the stream's ring, in pieces where it is larger than the ring."""
        segment, slot = place.segment, place.slot
        words = segment.memory.words(segment.layout.slot(slot) + layout.STREAM_WORDS, 2)
        start = segment.layout.response_payload(slot)
        ring = segment.buffer[start : start + layout.STREAM_RING_BYTES]
        piece_bytes = layout.STREAM_RING_BYTES // 2
        for offset in range(0, max(len(body), 1), piece_bytes):
            piece = bytes(body[offset : offset + piece_bytes])
            record = len(piece).to_bytes(4, "little") + piece
            while words[0] + len(record) - words[1] > layout.STREAM_RING_BYTES:
                if segment.cancels[slot] or not _exists(self._prefix, segment.index):
                    raise StreamClosed("the client has closed the connection")
                self._bells[segment.index].ring()
                time.sleep(_STREAM_WAIT_S)
            _ring_write(ring, words[0], record)
            words[0] += len(record)
        if segment.cancels[slot]:
            raise StreamClosed("the client has closed the connection")

    def _write(self, place: _Place, answer: Answer, ended: int) -> None:
        status, phrase, headers, body, error = answer
        segment, slot = place.segment, place.slot
        if place.streamed:
            self._end_stream(place, answer)
            return
        meta = phrase.encode("latin-1") + encode_headers(headers) if phrase or headers else b""
        if len(meta) > layout.RESPONSE_INLINE_BYTES:
            status, phrase, meta, body, error = 500, "", b"", b"The handler's response headers are too large", True
        if error:
            body = body[: layout.RESPONSE_INLINE_BYTES]
        flags, length = 0, len(body)
        if len(meta) + length > layout.RESPONSE_INLINE_BYTES:
            start = segment.layout.response_payload(slot)
            try:
                segment.memory.reserve(start, length)
            except SharedMemoryFull as full:
                print(f"{full}", file=sys.stderr)
                segment.fail(slot, 507, _FULL)
                return
            segment.buffer[start : start + length] = body
            body, flags = b"", ResponseFlag.BODY_OUTSIDE
        header = layout.RESPONSE.pack(
            self._started_ns, ended, length, status, flags, len(phrase), len(meta) - len(phrase)
        )
        segment.write_response(slot, header, meta, body)
        state = SlotState.FAILED if error else SlotState.DONE
        segment.states[slot] = segment.states[slot] & _NO_STATE | state

    def _end_stream(self, place: _Place, answer: Answer) -> None:
        """The final result is the last chunk; an error ends the stream unfinished."""
        segment, slot = place.segment, place.slot
        state = SlotState.FAILED if answer.error else SlotState.DONE
        if not answer.error:
            try:
                self._push(place, answer.body)
            except StreamClosed:
                state = SlotState.FAILED
        segment.states[slot] = segment.states[slot] & _NO_STATE | state

    def _segment(self, index: int) -> Segment | None:
        segment = self._segments.get(index)
        if segment is None:
            try:
                segment = self._segments[index] = Segment.attach(self._prefix, index)
                self._bells[index] = segment.bell(self._prefix)
            except FileNotFoundError:
                self._segments.pop(index, None)
                return None
            self._forget_dead_segments()
        return segment

    def _forget_dead_segments(self) -> None:
        """Lets go of segments whose owner has died: their names are gone, the pages go with the last mapping."""
        for index in [index for index in self._segments if not _exists(self._prefix, index)]:
            self._segments.pop(index).close()
            self._bells.pop(index).close()


def _exists(prefix: str, index: int) -> bool:
    return (SHM_DIRECTORY / segment_name(prefix, index)).exists()


def _ring_write(ring: memoryview, position: int, data: bytes) -> None:
    first = position % len(ring)
    room = len(ring) - first
    if len(data) <= room:
        ring[first : first + len(data)] = data
    else:
        ring[first:] = data[:room]
        ring[: len(data) - room] = data[room:]


def _print_metrics(samples: list[Any]) -> None:
    """Hands the handler's metrics over as lines on stdout, one write for all of them."""
    sys.stdout.write("".join(f"[METRICS]{sample}\n" for sample in samples))
    sys.stdout.flush()


def run(
    spec: ModelSpec,
    worker_id: int,
    start_count: int,
    gpu_id: int | None,
    prefix: str,
    batcher_index: int,
    threads: int,
    status_fd: int,
) -> int:
    """The life of a model worker; returns its exit code.

    Args:
        spec: the model version.
        worker_id: the worker's number (9000 …).
        start_count: which life of this worker it is; part of the mailbox's name.
        gpu_id: GPU for the handler, None for CPU.
        prefix: the instance's name prefix.
        batcher_index: the batcher that owns this worker.
        threads: CPU threads that the handler's libraries may use, 0 = as they like.
        status_fd: socket on which the result of loading is reported once.
    """
    status = Channel(socket.socket(fileno=status_fd))
    configure_logging()
    _limit_threads(threads)
    _keep_freed_memory()
    mailbox = WorkerMailbox(mailbox_name(prefix, batcher_index, worker_id, start_count))
    worker = ModelWorker(spec, prefix, mailbox, Board.attach(prefix).batcher_bell(batcher_index))
    began = time.monotonic()
    report: Callable[[int, str], None] = lambda code, message: status.send(  # noqa: E731
        {"event": "loaded", "status": code, "message": message, "load_ms": int((time.monotonic() - began) * 1000)}
    )
    try:
        worker.load(gpu_id)
    except LoadError as error:
        report(error.status, error.message)
        return 1
    except BaseException:  # the handler's traceback has been printed by Service.load
        print("Backend worker process died.", file=sys.stderr, flush=True)
        report(500, "Backend worker process died.")
        return 1
    gc.collect()
    gc.freeze()
    report(200, f"loaded model {spec.name}")
    status.close()
    worker.serve()
    worker.close()
    return 1 if worker.must_restart else 0


def _limit_threads(threads: int) -> None:
    """Caps the threads of OpenMP, MKL and torch: workers x cores threads on the same cores slow each other down."""
    if threads <= 0:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Lets malloc reuse the memory of large request bodies instead of giving it back and faulting it in again.

    glibc's defaults return every block above 128 KiB to the system when it is freed (mallopt(3)).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_HEAP_BYTES)


def main() -> int:
    """Entry of a model worker with its own interpreter (a model with its own Python environment)."""
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.batcher.worker")
    parser.add_argument("--spec-json", required=True)
    parser.add_argument("--worker-id", type=int, required=True)
    parser.add_argument("--start-count", type=int, required=True)
    parser.add_argument("--gpu-id", type=int)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--batcher-index", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--status-fd", type=int, required=True)
    args = parser.parse_args()
    return run(
        ModelSpec.from_dict(json.loads(args.spec_json)),
        args.worker_id,
        args.start_count,
        args.gpu_id,
        args.prefix,
        args.batcher_index,
        args.threads,
        args.status_fd,
    )


if __name__ == "__main__":
    sys.exit(main())
