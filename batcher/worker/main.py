"""The life of a model worker's process: `run` in a fork of the worker template, `main` in an interpreter of its own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import socket
import sys
import time
from collections.abc import Callable

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.mailbox import WorkerMailbox, mailbox_name
from wsgi_ts.batcher.spawn.environment import export_python_path, limit_threads
from wsgi_ts.batcher.worker.async_worker import AsyncWorker
from wsgi_ts.batcher.worker.worker import ModelWorker
from wsgi_ts.control.channel import Channel
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.service import configure_logging
from wsgi_ts.messages import ModelSpec
from wsgi_ts.process import enable_fault_traces, set_process_title

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_HEAP_BLOCK = 32 * 1024 * 1024
_KEPT_HEAP_BYTES = 64 * 1024 * 1024


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
    kind = AsyncWorker if spec.async_communication else ModelWorker
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
