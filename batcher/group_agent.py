"""The process that a group's batcher sees: torchrun's agent, which starts the ranks and ends them all when one ends.

Runs in: a fork of the worker template (torch is loaded there already), or the model's own interpreter. Beside the
agent a thread reads from the group board how loading goes, and tells the template, as a plain model worker does.
Ranks find the group's shared memory by name; nothing else connects them to this process but `PR_SET_PDEATHSIG`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wsgi_ts
from wsgi_ts.batcher.group import GroupBoard
from wsgi_ts.batcher.mailbox import mailbox_name
from wsgi_ts.channel import Channel, ChannelClosed
from wsgi_ts.messages import ModelSpec

log = logging.getLogger(__name__)

#: How often the ranks' progress is looked at while they load, in seconds.
_LOOK_EVERY_S = 0.02
#: How often the agent looks for a rank that has ended, in seconds: bounds how late a death is noticed.
_MONITOR_INTERVAL_S = 0.1
_LOADED = 200
_FAILED_TEXTS = {507: "System out of memory", 500: "Backend worker process died."}
#: Runs a rank; the server's folder goes behind the packages of the interpreter, which may be the model's own.
_BOOTSTRAP = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv.pop(1)]; "
    "from wsgi_ts.batcher.rank import main; sys.exit(main())"
)


def torchrun_arguments(options: Mapping[str, Any], rendezvous_id: str) -> list[str]:
    """The arguments for torchrun, without the program it runs.

    One node: a rendezvous of the agent's own, on a port that the system picks, so that groups never fight over one.
    Several nodes: the endpoint that the model's file names.

    Args:
        options: the `torchrun` section of the model (see `TorchrunOptions`), field names as keys.
        rendezvous_id: tells this group from others at the same endpoint.
    """
    arguments = [
        f"--nnodes={options['nnodes']}",
        f"--nproc-per-node={options['nproc_per_node']}",
        f"--rdzv-backend={options['rdzv_backend']}",
        f"--rdzv-id={rendezvous_id}",
        f"--rdzv-endpoint={options['rdzv_endpoint'] or 'localhost:0'}",
        f"--monitor-interval={min(options['monitor_interval'], _MONITOR_INTERVAL_S)}",
        # No files of its own: what ranks print goes where the agent's output goes.
        f"--log-dir={os.devnull}",
        # A group is started again by its batcher, with back-off, and never by torchrun behind its back.
        "--max-restarts=0",
    ]
    if options["rdzv_conf"]:
        arguments.append(f"--rdzv-conf={options['rdzv_conf']}")
    if options["nnodes"] > 1:
        arguments.append(f"--node-rank={options['node_rank']}")
    if options["master_addr"]:
        arguments.append(f"--master-addr={options['master_addr']}")
        arguments.append(f"--master-port={options['master_port'] or 29500}")
    return arguments


def rank_command(python: str, words: Sequence[str]) -> list[str]:
    """The command of one rank.

    Args:
        python: its interpreter.
        words: arguments of `rank.main`.
    """
    server_folder = str(Path(wsgi_ts.__file__).parent.parent)
    return [python, "-u", "-c", _BOOTSTRAP, server_folder, *words]


class LoadWatch(threading.Thread):
    """Tells the template how the loading of a group goes, until it has ended.

    Args:
        board: the group's.
        status: the socket to the template.
    """

    def __init__(self, board: GroupBoard, status: Channel) -> None:
        super().__init__(name="loading", daemon=True)
        self._board = board
        self._status = status

    def run(self) -> None:
        """Body of the thread."""
        began = time.monotonic()
        shown = 0
        try:
            while True:
                statuses = self._board.load_statuses()
                failed = next((status for status in statuses if status not in (0, _LOADED)), None)
                loaded = statuses.count(_LOADED)
                if loaded != shown:
                    shown = loaded
                    text = f"{loaded} of {len(statuses)} ranks have loaded the model"
                    print(text, flush=True)
                    self._status.send({"event": "progress", "text": text})
                if failed is not None or loaded == len(statuses):
                    code = failed or _LOADED
                    took_ms = int((time.monotonic() - began) * 1000)
                    message = _FAILED_TEXTS.get(code, "loaded")
                    self._status.send({"event": "loaded", "status": code, "message": message, "load_ms": took_ms})
                    return
                time.sleep(_LOOK_EVERY_S)
        except ChannelClosed:
            log.debug("The template is gone.")
        finally:
            self._status.close()


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
    """The life of a group's agent; returns its exit code. The arguments are those of `worker.run`."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    assert spec.torchrun is not None
    board = GroupBoard(mailbox_name(prefix, batcher_index, worker_id, start_count))
    LoadWatch(board, Channel(socket.socket(fileno=status_fd))).start()
    os.environ["OMP_NUM_THREADS"] = str(spec.torchrun["omp_number_threads"])
    words = ["--spec-json", json.dumps(spec.to_dict()), "--worker-id", str(worker_id)]
    words += ["--start-count", str(start_count), "--prefix", prefix, "--batcher-index", str(batcher_index)]
    if gpu_id is not None:
        words += ["--gpu-id", str(gpu_id)]
    arguments = torchrun_arguments(spec.torchrun, f"{spec.name}_{worker_id}")
    command = rank_command(spec.python or sys.executable, words)
    try:
        torchrun.run(torchrun.parse_args([*arguments, "--no-python", *command]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failed = min(error.failures)
        print(f"Rank {failed} ended with {error.failures[failed].exitcode}: the group ends.", file=sys.stderr)
        return 1
    return 0
