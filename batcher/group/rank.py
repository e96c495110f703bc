"""One rank of a group: a model worker that spans several processes, each started by torchrun.

Rank 0 is a model worker like any other: it takes batches from the mailbox and answers. Under `tp` and `pptp` it first
tells the others which slots the batch has; they read the same slots and call the handler with the same rows, and what
they return is dropped. Under `pp` only rank 0's handler is called; the others do what its pipeline tells them.

Ranks that disagree about a batch (one raises, another does not) can no longer be trusted to work in step: the batch
is answered with an error and the group ends, to be started again. The same holds for a rank that dies: the group's
agent then ends all of them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import sys
import time
from array import array
from collections.abc import Sequence

from wsgi_ts.batcher.group.rank_traces import RankTraces
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.group_board import GroupBoard, GroupFollower, GroupLeader, GroupStopped
from wsgi_ts.batcher.shm.mailbox import WorkerMailbox, mailbox_name
from wsgi_ts.batcher.spawn.environment import export_python_path, hide_own_arguments, limit_threads
from wsgi_ts.batcher.worker.batch_traces import device_of, line_fields
from wsgi_ts.batcher.worker.slots import SlotReference, WorkerSlots
from wsgi_ts.batcher.worker.worker import ModelWorker, metrics_sink
from wsgi_ts.handlers.serving.context import StreamClosed
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.log_records import Present, Running, TraceFields, configure_logging
from wsgi_ts.handlers.serving.results import PREDICTION_FAILED, Answer, error_answer
from wsgi_ts.handlers.serving.service import Service, end_copies
from wsgi_ts.messages import SpawnWorker
from wsgi_ts.process import die_with_parent, enable_fault_traces, set_process_title
from wsgi_ts.tracing.options import TraceOptions
from wsgi_ts.tracing.records import batch_ids

log = logging.getLogger(__name__)

#: The parallel type under which only rank 0 gets requests.
PIPELINE = "pp"
#: A rank that raised waits so long for the others to end the batch too, in seconds; after that they are out of step.
#: On a busy machine one of them may not run for some seconds, and loading the model again would take longer.
DISAGREEMENT_LIMIT_S = 10.0


class LeaderWorker(ModelWorker):
    """Rank 0 of a group whose ranks all get the requests."""

    def _tell_ranks(self, refs: list[SlotReference]) -> None:
        assert self._group is not None
        self._group.tell(array("Q", [ref.entry for ref in refs]).tobytes())

    def _write_answers(self, service: Service, refs: list[SlotReference], answers: list[Answer], ended: int) -> None:
        assert self._group is not None
        self._group.ended()
        outcomes = self._group.outcomes(DISAGREEMENT_LIMIT_S if service.raised else math.inf)
        if outcomes is None or any(outcome != service.raised for outcome in outcomes):
            print("The ranks of the group disagree about a batch: the group is started again.", file=sys.stderr)
            service.must_restart = True
            if not service.raised:
                answers = [error_answer(503, PREDICTION_FAILED)] * len(refs)
        super()._write_answers(service, refs, answers, ended)

    def _send_chunk(self, index: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
        # The other ranks do not hear that a client has gone, and go on: this one has to keep in step with them.
        with contextlib.suppress(StreamClosed):
            super()._send_chunk(index, status, phrase, headers, body)


class FollowerWorker:
    """Every other rank."""

    def __init__(self, order: SpawnWorker, group: GroupFollower, traces: RankTraces | None) -> None:
        self._spec = order.spec
        self._prefix = order.prefix
        self._group = group
        self._traces = traces
        self._slots = WorkerSlots(order.prefix, order.spec.decode_input_request)
        self._service: Service | None = None
        self._under_way: dict[str, Request] = {}  # of a continuous batch: those of its last step, by id

    def load(self, gpu_id: int | None) -> None:
        """Imports and initialises the handler (see `Service.load` for what it raises)."""
        self._service = Service.load(self._spec, gpu_id, _send_nothing, metrics_sink=metrics_sink(), group=self._group)

    def serve(self) -> None:
        """Takes part in what rank 0 tells, until it says stop.

        Raises:
            RuntimeError: the ranks are out of step.
            BaseException: what this rank's part of a pipeline raised.
        """
        service = self._service
        if service is None:
            raise RuntimeError("serve() before load()")
        while True:
            try:
                message = self._hear()
            except GroupStopped:
                return
            key = "" if self._traces is None else self._begin_traced(self._traces)
            if self._spec.parallel_type == PIPELINE:
                self._follow(service, message, key)
            else:
                self._take_part(service, message, key)

    def close(self) -> None:
        """Ends what the handler's service keeps."""
        self._flush()
        if self._service is not None:
            self._service.close()

    def _hear(self) -> bytes:
        """Waits for the next message; tells meanwhile what was done for the last one's batch."""
        while True:
            message = self._group.hear(math.inf if self._traces is None else self._traces.wait_s)
            if message is not None:
                return message
            if not self._goes_on():
                self._flush()

    def _goes_on(self) -> bool:
        """Whether there may be more to do for the batch whose part is to be told."""
        group, traces = self._group, self._traces
        return traces is not None and group.tells_more and traces.is_about(*group.traced)

    def _follow(self, service: Service, message: bytes, key: str) -> None:
        if self._group.follow is None:
            raise RuntimeError("rank 0 runs a pipeline, but this rank's handler has made none: get_pipeline_driver")
        if key:
            Present.batch = Running(lambda: TraceFields(*batch_ids(self._prefix, key)))
        self._group.follow(message)
        if key:
            self._end_traced(service, "")
        self._group.done(0)

    def _take_part(self, service: Service, message: bytes, key: str) -> None:
        refs = [self._slots.ref(entry) for entry in array("Q", message)]
        known = [ref for ref in refs if ref is not None]
        requests = [self._read(ref) for ref in known]
        if self._traces is not None:
            Present.batch = Running(lambda: line_fields(self._prefix, key, known, requests))
        if len(requests) == len(refs):
            service.predict(requests)
        if self._traces is not None:
            self._end_traced(service, service.fault if service.raised else "")
        self._group.done(int(service.raised))
        self._flush()
        if service.raised and not self._group.leader_ends(DISAGREEMENT_LIMIT_S):
            raise RuntimeError("this rank has failed, and the others have not ended the batch: the group ends")
        if self._spec.continuous_batching and not any(request.is_describe for request in requests):
            self._under_way = {request.request_id: request for request in requests}

    def _begin_traced(self, traces: RankTraces) -> str:
        """Notes that a message has come; returns the key of its batch, empty where no trace of it is recorded."""
        try:
            return traces.begin(*self._group.traced, time.monotonic_ns())
        except Exception:
            self._end_traces()
            return ""

    def _end_traced(self, service: Service, fault: str) -> None:
        """Notes that what the message wants is done."""
        Present.batch = None
        if self._traces is None:
            return
        try:
            self._traces.end(time.monotonic_ns(), device_of(service.handler), fault)
        except Exception:
            self._end_traces()

    def _flush(self) -> None:
        """Tells of this rank's part in the last batch."""
        if self._traces is None:
            return
        try:
            self._traces.flush()
        except Exception:
            self._end_traces()

    def _end_traces(self) -> None:
        # A handler can have changed any module under it; that costs the traces, and no request.
        self._traces = None
        with contextlib.suppress(Exception):
            log.exception("This rank notes no more traces")

    def _read(self, ref: SlotReference) -> Request:
        """The request as rank 0's handler gets it: what goes on in a continuous batch comes back as an empty row."""
        known = self._under_way.get(ref.segment.ids(ref.slot)[1])
        if known is None:
            return self._slots.read(ref)
        known.row = {}
        return known


def _send_nothing(index: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
    """Takes the place of streaming: rank 0 alone sends."""


def _end_process_group() -> None:
    """Lets go of torch's connections to the other ranks, which are leaving too."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def lead(order: SpawnWorker, name: str) -> int:
    """The life of rank 0; returns its exit code."""
    group = GroupLeader(GroupBoard(name))
    kind = ModelWorker if order.spec.parallel_type == PIPELINE else LeaderWorker
    bell = Board.attach(order.prefix).batcher_bell(order.batcher_index)
    worker = kind(order.spec, order.prefix, WorkerMailbox(name), bell, group, TraceOptions.from_dict(order.traces))
    if not _load(worker, group, order.gpu_id):
        return 1
    worker.serve()
    worker.close()
    if worker.must_restart:
        return 1
    group.stop()
    _end_process_group()
    return 0


def follow(order: SpawnWorker, name: str, rank: int) -> int:
    """The life of every other rank; returns its exit code."""
    group = GroupFollower(GroupBoard(name), rank)
    options = TraceOptions.from_dict(order.traces)
    traces = RankTraces(order, rank, options.exported_at) if options is not None and options.exported_at else None
    worker = FollowerWorker(order, group, traces)
    if not _load(worker, group, order.gpu_id):
        return 1
    worker.serve()
    worker.close()
    _end_process_group()
    return 0


def _load(worker: ModelWorker | FollowerWorker, group: GroupLeader | GroupFollower, gpu_id: int | None) -> bool:
    """Loads the handler and says on the group's board how that went."""
    try:
        worker.load(gpu_id)
    except LoadError as error:
        group.report_loaded(error.status)
        return False
    except BaseException:  # the handler's traceback has been printed by Service.load
        print(f"Backend worker process died. (rank {group.rank})", file=sys.stderr, flush=True)
        group.report_loaded(500)
        return False
    gc.collect()
    gc.freeze()
    group.report_loaded(200)
    return True


def main(words: Sequence[str] | None = None) -> int:
    """Entry of one rank; returns its exit code. Its only argument is what the group is, as JSON."""
    die_with_parent(os.getppid())
    (text,) = sys.argv[1:] if words is None else words
    order = SpawnWorker.from_json(text)
    spec = order.spec
    rank = int(os.environ["LOCAL_RANK"])
    enable_fault_traces()
    set_process_title(f"wsgi-ts: rank {rank} of {order.worker_id} {spec.title} {spec.version}")
    traces = TraceOptions.from_dict(order.traces)
    configure_logging(shows_traces=traces is not None and bool(traces.exported_at))
    end_copies()
    limit_threads(int(os.environ["OMP_NUM_THREADS"]))
    export_python_path(spec)
    hide_own_arguments(spec)
    name = mailbox_name(order.prefix, order.batcher_index, order.worker_id, order.start_count)
    return follow(order, name, rank) if rank else lead(order, name)
