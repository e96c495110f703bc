"""The life of a model worker's process: `run` in a fork of the worker template, `main` in an interpreter of its own."""

from __future__ import annotations

import ctypes
import gc
import socket
import sys
import time

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.mailbox import WorkerMailbox, mailbox_name
from wsgi_ts.batcher.spawn.environment import export_python_path, hide_own_arguments, limit_threads
from wsgi_ts.batcher.worker.async_worker import AsyncWorker
from wsgi_ts.batcher.worker.function_worker import FunctionWorker
from wsgi_ts.batcher.worker.worker import ModelWorker
from wsgi_ts.control.channel import Channel
from wsgi_ts.control.codec import FROM_WORKER
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.log_records import configure_logging
from wsgi_ts.handlers.serving.service import end_copies
from wsgi_ts.messages import SpawnWorker, WorkerLoaded
from wsgi_ts.process import enable_fault_traces, set_process_title
from wsgi_ts.tracing.options import TraceOptions

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_HEAP_BLOCK = 32 * 1024 * 1024
_KEPT_HEAP_BYTES = 64 * 1024 * 1024


def run(order: SpawnWorker, status_fd: int) -> int:
    """The life of a model worker; returns its exit code. How loading ends is reported on the socket `status_fd`."""
    spec, prefix = order.spec, order.prefix
    status = Channel(socket.socket(fileno=status_fd))
    traces = TraceOptions.from_dict(order.traces)
    configure_logging(shows_traces=traces is not None and bool(traces.exported_at))
    end_copies()
    limit_threads(order.threads)
    export_python_path(spec)
    hide_own_arguments(spec)
    _keep_freed_memory()
    mailbox = WorkerMailbox(mailbox_name(prefix, order.batcher_index, order.worker_id, order.start_count))
    kind = AsyncWorker if spec.async_communication else FunctionWorker if spec.functions else ModelWorker
    bell = Board.attach(prefix).batcher_bell(order.batcher_index)
    worker = kind(spec, prefix, mailbox, bell, traces=traces)
    began = time.monotonic()

    def report(code: int, message: str) -> None:
        load_ms = int((time.monotonic() - began) * 1000)
        loaded = WorkerLoaded(order.worker_id, order.start_count, code, message, load_ms)
        status.send(FROM_WORKER.encode(loaded))

    try:
        worker.load(order.gpu_id)
    except LoadError as error:
        report(error.status, error.message)
        return 1
    except BaseException:  # the handler's traceback has been printed by Service.load
        print("Backend worker process died.", file=sys.stderr, flush=True)
        report(500, "Backend worker process died.")
        return 1
    gc.collect()
    gc.freeze()
    report(200, f"loaded model {spec.title}")
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
    _, text, status_fd = sys.argv
    order = SpawnWorker.from_json(text)
    enable_fault_traces()
    set_process_title(f"wsgi-ts: model worker {order.worker_id} {order.spec.title} {order.spec.version}")
    return run(order, int(status_fd))
