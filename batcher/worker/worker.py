"""A model worker: loads one handler, then takes batches from its mailbox and writes answers into the slots.

This is the only module of the data path that imports `handlers`. The handler is user code: it may raise, exit, print
or hang; what is in shared memory stays consistent because a slot's state word is written after everything else.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import time
from functools import partial
from typing import Any

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.doorbell import LONGEST_IDLE_WAIT_S, Doorbell
from wsgi_ts.batcher.shm.group_board import GroupLeader
from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.batcher.shm.mailbox import WorkerMailbox
from wsgi_ts.batcher.shm.request_codec import read_request
from wsgi_ts.batcher.shm.worker_layout import mark_of
from wsgi_ts.batcher.worker.batch_traces import BatchRun, BatchTraces, device_of, line_fields
from wsgi_ts.batcher.worker.continuous import UnderWay, ended_sequences, is_part
from wsgi_ts.batcher.worker.slots import SlotReference, WorkerSlots
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.log_records import Present, Running
from wsgi_ts.handlers.serving.recording import RecordedRequest, Recorder
from wsgi_ts.handlers.serving.results import Answer
from wsgi_ts.handlers.serving.service import MetricsSink, Service
from wsgi_ts.messages import ModelSpec
from wsgi_ts.tracing.options import TraceOptions
from wsgi_ts.tracing.records import batch_key

log = logging.getLogger(__name__)

#: A worker whose last batch came within SOON_NS and held at most FEW requests spins for SPIN_NS before it sleeps, if
#: at most MOST_SPINNING of its batcher's workers had something to do then.
SOON_NS = 500_000
SPIN_NS = 200_000
FEW = 2
MOST_SPINNING = max(FEW, len(os.sched_getaffinity(0)) // 2)
#: Where nothing comes for so long, segments of web workers that have died are let go (seconds).
IDLE_S = LONGEST_IDLE_WAIT_S
#: Above what handlers that redirect their output have in their hands.
_FIRST_KEPT_FD = 10
#: What is slow is thought over every so many batches, less one, and in idle moments.
_LOOKS_EVERY = 255
_PACK = layout.BATCH.pack


class ModelWorker:
    """Serves the batches of one mailbox with one loaded handler.

    Args:
        group: this process's side of its group's board, where it is rank 0 of one.
        traces: which batches a record is made of; None: of none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        prefix: str,
        mailbox: WorkerMailbox,
        batcher_bell: Doorbell,
        group: GroupLeader | None = None,
        traces: TraceOptions | None = None,
    ) -> None:
        self._spec = spec
        self._prefix = prefix
        self._group = group
        self._mailbox = mailbox
        self._batcher_bell = batcher_bell
        self._slots = WorkerSlots(prefix, spec.decode_input_request, mailbox, spec.client_timeout_ms)
        self._places: list[SlotReference] = []
        self._under_way = UnderWay()
        self._in_step = False
        self._ended_marks: list[int] = []  # marks of sequences of whose end the batcher has not been told
        self._service: Service | None = None
        self._recorder: Recorder | None = None
        self._started_ns = 0
        self._number = 0  # of the batch that was begun last
        self._traces = BatchTraces(spec, traces) if traces is not None else None
        self._exports = traces is not None and bool(traces.exported_at)
        self._last_wait_ns = SOON_NS
        self._last_count = 0

    @property
    def must_restart(self) -> bool:
        """True once the handler's device is broken, so that a new process is needed."""
        return self._service is not None and self._service.must_restart

    def load(self, gpu_id: int | None) -> None:
        """Imports and initialises the handler (see `Service.load` for what it raises)."""
        self._service = Service.load(
            self._spec,
            gpu_id,
            self._send_chunk,
            metrics_sink=metrics_sink(),
            group=self._group,
            kv_cache_sink=self._mailbox.show_kv_cache,
        )
        self._recorder = Recorder.of(self._service.context.model_yaml_config)

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
        if self._spec.continuous_batching:
            self._serve_continuously(service)
            return
        number = 0
        while not service.must_restart:
            if not self._wait_for(number + 1):
                return
            number += 1
            self._number = number
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
        if mailbox.posted() >= number:  # it lies ready: nothing to wait for
            self._last_wait_ns = 0
            return True
        bell = mailbox.bell
        idle_since = time.monotonic_ns()
        # Where the last batch came soon and was small, a few clients wait for each other answer, and being woken would
        # be half of their time. Under more load the core is better left to those who make the next batch: workers that
        # spin beside each other take more of it than their requests do.
        is_quick = self._last_wait_ns < SOON_NS and self._last_count <= FEW and mailbox.busy <= MOST_SPINNING
        spin_ns = SPIN_NS if is_quick else 0
        while not bell.wait(lambda: mailbox.posted() >= number or mailbox.stopping, IDLE_S, spin_ns=spin_ns):
            self._slots.forget_dead()
            if self._traces is not None:
                self._traces.look(time.monotonic())
            spin_ns = 0
        self._last_wait_ns = time.monotonic_ns() - idle_since
        return mailbox.posted() >= number

    def _serve_continuously(self, service: Service) -> None:
        """As `serve`, in steps: new requests join between two of them, and each leaves when it has ended."""
        mailbox, under_way = self._mailbox, self._under_way
        number = 0
        while not service.must_restart:
            if not under_way.refs and not self._wait_for(number + 1):
                return
            before, finished = number, 0
            while mailbox.posted() > number:
                number += 1
                self._number = number
                finished += self._let_join(service, mailbox.take_over(number))
            finished += self._drop_gone()
            if under_way.refs and not service.must_restart:
                finished += self._step(service)
            self._ended_marks = mailbox.put_ended(self._ended_marks)
            mailbox.add_finished(finished)
            if finished or number > before:
                self._batcher_bell.ring(layout.News.COMPLETION)

    def _let_join(self, service: Service, entries: list[int]) -> int:
        """Lets new requests join the continuous batch; returns how many ended at once."""
        self._started_ns = time.monotonic_ns()
        self._last_count = len(entries)
        joined = 0
        for ref, request in zip(*self._accept(entries), strict=True):
            if request.is_describe:  # always by itself, and answered at once
                self._call(service, [ref], [request])
            else:
                self._under_way.join(ref, request)
                ref.batch = self._batch_facts(len(self._under_way.refs))
                joined += 1
        self._slots.ring_owners(entries)
        return len(entries) - joined

    def _drop_gone(self) -> int:
        """Lets go of the requests whose client has gone; returns how many."""
        gone = self._under_way.drop_gone()
        for ref in gone:
            self._slots.end_cancelled(ref)
        self._slots.ring_owners([ref.entry for ref in gone])
        return len(gone)

    def _step(self, service: Service) -> int:
        """One call of the handler with all requests under way; returns how many have ended with it."""
        under_way = self._under_way
        refs = under_way.refs
        self._in_step = True
        self._call(service, refs, under_way.requests)
        self._in_step = False
        self._slots.ring_owners([ref.entry for ref in refs])
        return under_way.end_step()

    def _call(self, service: Service, refs: list[SlotReference], requests: list[Request]) -> None:
        """Calls the handler with its own limit of time."""
        self._started_ns = time.monotonic_ns()
        self._mailbox.begin_step(self._started_ns)
        self._predict(service, refs, requests)
        self._mailbox.end_step(time.monotonic_ns() - self._started_ns)

    def _accept(self, entries: list[int]) -> tuple[list[SlotReference], list[Request]]:
        """The requests to run of those that were dispatched; from now on they are RUNNING."""
        limit_ms = self._spec.client_timeout_ms
        oldest_ns = self._started_ns - limit_ms * 1_000_000 if limit_ms else 0
        return self._slots.begin(entries, oldest_ns)

    def _run_batch(self, service: Service, entries: list[int]) -> None:
        refs, requests = self._accept(entries)
        if self._slots.has_describe:
            # A handler answers a describe request with one element, whatever else is in its batch.
            for ref, request in zip(refs, requests, strict=True):
                self._predict(service, [ref], [request])
        elif requests:
            self._predict(service, refs, requests)
        self._slots.ring_owners(entries)

    def _predict(self, service: Service, refs: list[SlotReference], requests: list[Request]) -> None:
        """Calls the handler and writes the answers."""
        self._places = refs
        self._mailbox.count_execution()
        if self._exports:
            self._begin_traced(refs, requests)
        if self._group is not None:
            self._tell_ranks(refs)
        answers = service.predict(requests)
        if self._exports:
            self._end_traced()
        is_given_back = (
            service.raised and self._spec.repeats and len(refs) > 1 and not any(ref.streamed for ref in refs)
        )
        if self._recorder is not None and not self._in_step and not is_given_back:
            self._record(self._recorder, refs, answers)
        ended_ns = time.monotonic_ns()
        if not self._in_step:
            self._tell_batch(service, refs, requests, ended_ns)
        if is_given_back:
            self._give_back(service, refs, answers, ended_ns)
        else:
            self._write_answers(service, refs, answers, ended_ns)

    def _begin_traced(self, refs: list[SlotReference], requests: list[Request]) -> None:
        """Says what runs now: to what makes the handler's log records, and to the other ranks where it has a span."""
        if self._in_step or self._slots.has_sampled:  # else there is nothing that a line could tell
            Present.batch = self._running_now(refs, requests, has_span=not self._in_step)
        if self._group is not None:
            has_span = not self._in_step and any(ref.sampled for ref in refs)
            self._group.trace(self._number if has_span else 0, self._mailbox.posted_ns)

    def _end_traced(self) -> None:
        """Says that the handler has returned."""
        Present.batch = None
        if self._group is not None:
            self._group.trace_ended()

    def _tell_ranks(self, refs: list[SlotReference]) -> None:
        """Tells the other ranks of a batch; of a pipeline that does it itself."""

    def _running_now(self, refs: list[SlotReference], requests: list[Request], *, has_span: bool) -> Running:
        """What runs now, for the handler's log lines."""
        key = batch_key(self._mailbox.worker_id, self._number, self._mailbox.posted_ns) if has_span else ""
        return Running(partial(line_fields, self._prefix, key, refs, requests))

    def _batch_facts(self, size: int, marks: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)) -> bytes:
        """What the slots of a batch tell of it, for traces.

        `marks` are those of `Service.marks`; 0 where they are to come.
        """
        mailbox = self._mailbox
        try:
            return _PACK(mailbox.posted_ns, self._number, mailbox.worker_id, size, mailbox.reason, *marks)
        except struct.error:  # more requests than can be told
            return layout.NO_BATCH

    def _tell_batch(self, service: Service, refs: list[SlotReference], requests: list[Request], ended_ns: int) -> None:
        """Notes for traces how the batch was run: in each of its slots, and by itself where it is worth that."""
        facts = self._batch_facts(len(refs), service.marks())
        for ref in refs:
            ref.batch = facts
        traces = self._traces
        if traces is None:
            return
        oldest = refs[0]
        took_ns = ended_ns - oldest.segment.arrival_ns(oldest.slot)
        try:
            if not self._number & _LOOKS_EVERY:
                traces.look(ended_ns / 1e9)
            if (
                took_ns >= traces.threshold_ns
                or service.has_failed
                or (self._group is not None and self._slots.has_sampled)
            ):
                fault = service.fault if service.raised else ""
                device = device_of(service.handler) if self._group is not None else ""
                run = BatchRun(facts, self._started_ns, ended_ns, took_ns, fault, service.has_failed, device)
                traces.note(run, refs, requests)
        except Exception:
            # A handler can have changed any module under it; that costs the traces, and no request.
            self._traces = None
            with contextlib.suppress(Exception):
                log.exception("This worker notes no more traces")

    def _give_back(self, service: Service, refs: list[SlotReference], answers: list[Answer], ended: int) -> None:
        """Leaves a batch that failed to the batcher, which has its requests run again or answers them so."""
        for ref, answer in zip(refs, answers, strict=True):
            self._slots.leave(ref, answer, self._started_ns, ended)
        if service.out_of_memory:
            self._mailbox.note_out_of_memory()

    def _record(self, recorder: Recorder, refs: list[SlotReference], answers: list[Answer]) -> None:
        """Records what a model-config.yaml wants recorded, before the answers are written over the requests."""
        pairs = zip(refs, answers, strict=True)
        recorder.put([recorded for ref, answer in pairs if (recorded := _recorded(ref, answer)) is not None])
        if recorder.is_done:
            self._recorder = None

    def _write_answers(self, service: Service, refs: list[SlotReference], answers: list[Answer], ended: int) -> None:
        if not self._in_step:
            self._slots.write_all(refs, answers, self._started_ns, ended)
            return
        if self._spec.sequence_batching:
            header = service.context.header_key_sequence_end
            self._ended_marks += [mark_of(key) for key in ended_sequences(answers, header)]
        for ref, answer in zip(refs, answers, strict=True):
            if is_part(answer):
                if self._slots.send_part(ref, answer, self._started_ns):
                    self._under_way.stay(ref)
            else:
                self._slots.write(ref, answer, self._started_ns, ended)

    def _send_chunk(self, index: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Sends a chunk of the answer to one row of the present batch (called from inside the handler)."""
        answer = Answer(status, phrase, headers, body, False)
        ref = self._places[index]
        if not ref.streamed and ref.batch is layout.NO_BATCH:
            ref.batch = self._batch_facts(len(self._places))
        self._slots.send_chunk(ref, answer, self._started_ns)


def _recorded(ref: SlotReference, answer: Answer) -> RecordedRequest | None:
    """A request with a body of its own: no description, no fields of a gRPC call, no answers of a workflow's nodes."""
    _, flags, head, _, _, body = read_request(ref.segment, ref.slot)
    if flags & (RequestFlag.DESCRIBE | RequestFlag.FIELDS | RequestFlag.REFERENCES):
        return None
    if ref.streamed:  # here is the last chunk only
        return RecordedRequest.from_head(head, bytes(body))
    return RecordedRequest.from_head(head, bytes(body), answer.status, bytes(answer.body))


def metrics_sink() -> MetricsSink:
    """What hands a handler's metrics over as lines on stdout, one write for all of them.

    To be made before the handler is loaded: that may close stdout, or put something else in the place of `sys.stdout`.
    """
    fd = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, _FIRST_KEPT_FD)

    def write(samples: list[Any]) -> None:
        text = "".join(f"[METRICS]{sample}\n" for sample in samples)
        # Where even this descriptor was closed the metrics are lost, and no request.
        with contextlib.suppress(OSError):
            os.write(fd, text.encode("utf-8", "backslashreplace"))

    return write
