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
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.board import Board
from wsgi_ts.batcher.continuous import UnderWay, ended_sequences, is_part
from wsgi_ts.batcher.doorbell import Doorbell
from wsgi_ts.batcher.group import GroupLeader
from wsgi_ts.batcher.layout import SlotState
from wsgi_ts.batcher.mailbox import WorkerMailbox, mailbox_name
from wsgi_ts.batcher.sequences import mark_of
from wsgi_ts.batcher.worker_environment import export_python_path, limit_threads
from wsgi_ts.batcher.worker_slots import Place, WorkerSlots
from wsgi_ts.channel import Channel
from wsgi_ts.handlers.service import Answer, LoadError, Request, Service, configure_logging
from wsgi_ts.messages import ModelSpec
from wsgi_ts.process import enable_fault_traces, set_process_title

#: A worker whose last batch came within SOON_NS and held at most FEW requests looks actively for
#: the next one, for LOOK_NS, before it sleeps.
SOON_NS = 500_000
LOOK_NS = 200_000
FEW = 2
#: Where nothing comes for so long, segments of web workers that have died are let go (seconds).
IDLE_S = 1.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_HEAP_BLOCK = 32 * 1024 * 1024
_KEPT_HEAP_BYTES = 64 * 1024 * 1024


class ModelWorker:
    """Serves the batches of one mailbox with one loaded handler."""

    def __init__(
        self,
        spec: ModelSpec,
        prefix: str,
        mailbox: WorkerMailbox,
        batcher_bell: Doorbell,
        group: GroupLeader | None = None,
    ) -> None:
        self._spec = spec
        self._group = group
        self._mailbox = mailbox
        self._batcher_bell = batcher_bell
        self._slots = WorkerSlots(prefix, spec.decode_input_request)
        self._places: list[Place] = []
        self._under_way = UnderWay()
        self._in_step = False
        self._ended_marks: list[int] = []  # marks of sequences of whose end the batcher has not been told
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
        self._service = Service.load(
            self._spec, gpu_id, self._send_chunk, metrics_sink=print_metrics, group=self._group
        )

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
        # Where the last batch came soon and was small, a few clients wait for each other answer, and being woken would
        # be half of their time. Under more load the core is better left to those who make the next batch.
        spin_ns = LOOK_NS if self._last_wait_ns < SOON_NS and self._last_count <= FEW else 0
        while not bell.wait(lambda: mailbox.posted() >= number or mailbox.stopping, IDLE_S, spin_ns=spin_ns):
            self._slots.forget_dead()
            spin_ns = 0
        self._last_wait_ns = time.monotonic_ns() - idle_since
        return mailbox.posted() >= number

    def _serve_continuously(self, service: Service) -> None:
        """As `serve`, in steps: new requests join between two of them, and each leaves when it has ended."""
        mailbox, under_way = self._mailbox, self._under_way
        number = 0
        while not service.must_restart:
            if not under_way.places and not self._wait_for(number + 1):
                return
            before, finished = number, 0
            while mailbox.posted() > number:
                number += 1
                finished += self._let_join(service, mailbox.take_over(number))
            finished += self._drop_gone()
            if under_way.places and not service.must_restart:
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
        for place, request in zip(*self._accept(entries), strict=True):
            if request.is_describe:  # always by itself, and answered at once
                self._call(service, [place], [request])
            else:
                self._under_way.join(place, request)
                joined += 1
        self._ring_owners(entries)
        return len(entries) - joined

    def _drop_gone(self) -> int:
        """Lets go of the requests whose client has gone; returns how many."""
        gone = self._under_way.drop_gone()
        for place in gone:
            place.segment.fail_cancelled(place.slot)
        self._ring_owners([place.entry for place in gone])
        return len(gone)

    def _step(self, service: Service) -> int:
        """One call of the handler with all requests under way; returns how many have ended with it."""
        under_way = self._under_way
        places = under_way.places
        self._in_step = True
        self._call(service, places, under_way.requests)
        self._in_step = False
        self._ring_owners([place.entry for place in places])
        return under_way.end_step()

    def _call(self, service: Service, places: list[Place], requests: list[Request]) -> None:
        """Calls the handler with its own limit of time."""
        self._started_ns = time.monotonic_ns()
        self._mailbox.begin_step(self._started_ns)
        self._predict(service, places, requests)
        self._mailbox.end_step(time.monotonic_ns() - self._started_ns)

    def _accept(self, entries: list[int]) -> tuple[list[Place], list[Request]]:
        """The requests to run of those that were handed over; from now on they are RUNNING."""
        limit_ms = self._spec.client_timeout_ms
        oldest_ns = self._started_ns - limit_ms * 1_000_000 if limit_ms else 0
        places, requests = self._slots.accept(entries, oldest_ns)
        for place in places:
            place.set_state(SlotState.RUNNING)
        return places, requests

    def _ring_owners(self, entries: list[int]) -> None:
        for index in {layout.split_mail_entry(entry)[0] for entry in entries}:
            self._slots.ring(index)

    def _run_batch(self, service: Service, entries: list[int]) -> None:
        places, requests = self._accept(entries)
        if any(request.is_describe for request in requests):
            # A handler answers a describe request with one element, whatever else is in its batch.
            for place, request in zip(places, requests, strict=True):
                self._predict(service, [place], [request])
        elif requests:
            self._predict(service, places, requests)
        self._ring_owners(entries)

    def _predict(self, service: Service, places: list[Place], requests: list[Request]) -> None:
        """Calls the handler and writes the answers."""
        self._places = places
        answers = service.predict(requests)
        self._write_answers(service, places, answers, time.monotonic_ns())

    def _write_answers(self, service: Service, places: list[Place], answers: list[Answer], ended: int) -> None:
        if self._in_step and self._spec.sequence_batching:
            header = service.context.header_key_sequence_end
            self._ended_marks += [mark_of(key) for key in ended_sequences(answers, header)]
        for place, answer in zip(places, answers, strict=True):
            if self._in_step and is_part(answer):
                if self._slots.send_part(place, answer, self._started_ns):
                    self._under_way.stay(place)
            else:
                self._slots.write(place, answer, self._started_ns, ended)

    def _send_chunk(self, index: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Sends a chunk of the answer to one row of the present batch (called from inside the handler)."""
        self._slots.send_chunk(self._places[index], self._started_ns, status, phrase, headers, body)


def print_metrics(samples: list[Any]) -> None:
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
    limit_threads(threads)
    export_python_path(spec)
    _keep_freed_memory()
    mailbox = WorkerMailbox(mailbox_name(prefix, batcher_index, worker_id, start_count))
    kind: type[ModelWorker] = ModelWorker
    if spec.async_communication:
        from wsgi_ts.batcher.async_worker import AsyncWorker  # it derives from what is defined here

        kind = AsyncWorker
    worker = kind(spec, prefix, mailbox, Board.attach(prefix).batcher_bell(batcher_index))
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
    spec = ModelSpec.from_dict(json.loads(args.spec_json))
    enable_fault_traces()
    set_process_title(f"wsgi-ts: model worker {args.worker_id} {spec.name} {spec.version}")
    return run(
        spec,
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
