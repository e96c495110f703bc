"""The process that a group's batcher sees: torchrun's agent, which starts the ranks; all of them end when one ends.

Runs in a fork of the worker template, where torch is loaded already. The ranks are forks of this process in turn, or
processes of the model's own interpreter. Beside the agent a thread reads from the group board how loading goes, tells
the template, as a plain model worker does, and watches the ranks' processes: torchrun's own watch looks for them every
so often, asks the others to leave, and does not mind a rank that leaves by itself with exit code 0.
A fork has copies of the locks that other threads hold just then, and waits for them for ever. So that no thread does
anything while ranks are forked, that thread and the forked ranks begin when the last is there (`RankGate`).
Ranks find the group's shared memory by name; nothing else connects them to this process but `PR_SET_PDEATHSIG`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import wsgi_ts
from wsgi_ts.batcher.group import rank
from wsgi_ts.batcher.shm.group_board import GroupBoard
from wsgi_ts.batcher.shm.mailbox import mailbox_name
from wsgi_ts.batcher.spawn.exit import EXIT_CODE_OUT_OF_MEMORY
from wsgi_ts.batcher.spawn.process import refresh, reset_signals, run_and_exit
from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.control.codec import FROM_WORKER
from wsgi_ts.messages import FromWorker, SpawnWorker, WorkerLoaded, WorkerProgress

log = logging.getLogger(__name__)

#: How often the ranks' progress is polled while they load, in seconds.
_POLL_EVERY_S = 0.02
#: How often torchrun looks for a rank that has ended, in seconds: for those that end before they are on the board.
_MONITOR_INTERVAL_S = 1
#: Among several machines: when one that has gone is missed, so that it can join again. torchrun's own are 5 and 3.
_KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=5"
#: On one machine there is nobody to miss: torchrun's thread for it sleeps while ranks are forked, and later.
_NO_KEEP_ALIVE = "keep_alive_interval=1000000"
_FIRST_DESCRIPTOR = 3  # behind stdin, stdout and stderr
_LOADED = 200
_FAILED_TEXTS = {507: "System out of memory", 500: "Backend worker process died."}
#: Runs a rank; the server's folder goes behind the packages of the interpreter, which may be the model's own.
_BOOTSTRAP = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv.pop(1)]; "
    "from wsgi_ts.batcher.group.rank import main; sys.exit(main())"
)


def torchrun_arguments(options: Mapping[str, Any], rendezvous_id: str) -> list[str]:
    """The arguments for torchrun, without the program it runs.

    One node: a rendezvous of the agent's own, on a port that the system picks, so that groups never fight over one.
    Several nodes: the endpoint that the model's file names.

    `options` is the `torchrun` section of the model (see `TorchrunOptions`), field names as keys; `rendezvous_id` tells
    this group from others at the same endpoint.
    """
    arguments = [
        f"--nnodes={options['nnodes']}",
        f"--nproc-per-node={options['nproc_per_node']}",
        f"--rdzv-backend={options['rdzv_backend']}",
        f"--rdzv-id={rendezvous_id}",
        f"--monitor-interval={min(options['monitor_interval'], _MONITOR_INTERVAL_S)}",
        # No files of its own: what ranks print goes where the agent's output goes.
        f"--log-dir={os.devnull}",
        "--start-method=fork",
        # A group is started again by its batcher, with back-off, and never by torchrun behind its back.
        "--max-restarts=0",
    ]
    if options["rdzv_endpoint"]:
        arguments.append(f"--rdzv-endpoint={options['rdzv_endpoint']}")
    elif options["rdzv_backend"] != "static":  # which meets at master-addr and master-port
        arguments.append("--rdzv-endpoint=localhost:0")
    # What the model's file says comes later, and counts.
    settings = [_KEEP_ALIVE if options["nnodes"] > 1 else _NO_KEEP_ALIVE]
    if options["rdzv_conf"]:
        settings.append(options["rdzv_conf"])
    arguments.append(f"--rdzv-conf={','.join(settings)}")
    if options["nnodes"] > 1:
        arguments.append(f"--node-rank={options['node_rank']}")
    if options["master_addr"]:
        arguments.append(f"--master-addr={options['master_addr']}")
    arguments.append(f"--master-port={options['master_port'] or 29500}")
    return arguments


def rank_command(python: str, words: Sequence[str]) -> list[str]:
    """The command of one rank, with the arguments of `rank.main`."""
    server_folder = str(Path(wsgi_ts.__file__).parent.parent)
    return [python, "-u", "-c", _BOOTSTRAP, server_folder, *words]


class RankGate:
    """Has forked ranks, and what else is to run beside the agent, wait until the last of them is forked.

    Torchrun's store, to which ranks connect, has a thread in this process: it must have nothing to do while there are
    forks to come.

    Args:
        open_to: called in this process after the last one.
    """

    def __init__(self, ranks: int, open_to: Callable[[], object]) -> None:
        self._ranks = self._missing = ranks
        self._open_to = open_to
        self._reading, self._writing = os.pipe()
        os.register_at_fork(after_in_parent=self._has_forked)

    def _has_forked(self) -> None:
        self._missing -= 1
        if not self._missing:
            os.write(self._writing, bytes(self._ranks))
            self._open_to()

    def pass_through(self) -> None:
        """Waits, in a rank; ends the process if the agent has ended meanwhile. The gate is closed to its own forks."""
        self._missing = -1
        os.close(self._writing)
        if not os.read(self._reading, 1):
            os._exit(1)


class GroupWatch(threading.Thread):
    """Tells the template how a group's loading goes; ends this process, and so all ranks, when one of them ends."""

    def __init__(self, order: SpawnWorker, board: GroupBoard, status: Channel) -> None:
        super().__init__(name="ranks", daemon=True)
        self._order = order
        self._board = board
        self._status = status
        self._began = time.monotonic()
        self._shown = 0  # ranks that have loaded, as last told
        self._told = False  # how loading ended
        self._running: dict[int, tuple[int, int]] = {}  # by descriptor: rank and pid
        self._seen: set[int] = set()
        self._ended = 0
        self._poll = select.poll()

    def run(self) -> None:
        """Body of the thread."""
        while self._ended < self._board.ranks:
            self._meet_ranks()
            self._tell_progress()
            # Once all are known there is nothing to look at but their ends.
            settled = self._told and len(self._seen) == self._board.ranks
            for descriptor, _ in self._poll.poll(None if settled else _POLL_EVERY_S * 1000):
                self._tell_progress()
                self._rank_ended(descriptor)
        os._exit(0)

    def _meet_ranks(self) -> None:
        """Watches the processes that have come since the last time."""
        for number, pid in enumerate(self._board.pids()):
            if not pid or number in self._seen:
                continue
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                _end_group(number, "it is gone", 1)
            self._seen.add(number)
            self._running[descriptor] = number, pid
            self._poll.register(descriptor, select.POLLIN)

    def _tell_progress(self) -> None:
        """Tells what has become of loading since the last time; at its end that, and then no more."""
        if self._told:
            return
        statuses = self._board.load_statuses()
        failed = next((status for status in statuses if status not in (0, _LOADED)), None)
        loaded = statuses.count(_LOADED)
        try:
            if loaded != self._shown:
                self._shown = loaded
                text = f"{loaded} of {len(statuses)} ranks have loaded the model"
                print(text, flush=True)
                self._tell(WorkerProgress(self._order.worker_id, self._order.start_count, text))
            if failed is not None or loaded == len(statuses):
                code = failed or _LOADED
                took_ms = int((time.monotonic() - self._began) * 1000)
                message = _FAILED_TEXTS.get(code, "loaded")
                self._tell(WorkerLoaded(self._order.worker_id, self._order.start_count, code, message, took_ms))
                self._told = True
                self._status.close()
        except ChannelClosed:
            log.debug("The template is gone, and this process goes with it.")
            self._told = True

    def _tell(self, message: FromWorker) -> None:
        self._status.send(FROM_WORKER.encode(message))

    def _rank_ended(self, descriptor: int) -> None:
        """A rank has ended: one of all that were told to leave, or the first of a group that must end with it."""
        number, pid = self._running.pop(descriptor)
        self._poll.unregister(descriptor)
        try:
            # Not collected: that is torchrun's part.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            ended = None
        finally:
            os.close(descriptor)
        if ended is None:
            _end_group(number, "it ended", 1)
        elif ended.si_code != os.CLD_EXITED:
            name = signal.strsignal(ended.si_status)
            # Most likely by the kernel, for lack of memory: the batcher judges this exit as a plain worker's.
            code = EXIT_CODE_OUT_OF_MEMORY if ended.si_status == signal.SIGKILL else 1
            _end_group(number, f"it was ended by signal {ended.si_status} ({name})", code)
        elif ended.si_status or not self._board.stopping:
            _end_group(number, f"it left with exit code {ended.si_status}", 1)
        else:
            self._ended += 1


def _end_group(number: int, how: str, code: int) -> NoReturn:
    print(f"Rank {number}: {how}. The group ends with it.", file=sys.stderr, flush=True)
    os._exit(code)


def _close_descriptors() -> None:
    """Closes what the agent has open, but for pipes' writing ends: by one of them torchrun sees that the rank lives."""
    for descriptor in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the listing's own is gone
            is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
            writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
            if descriptor >= _FIRST_DESCRIPTOR and not (is_pipe and writes):
                os.close(descriptor)


def run_forked_rank(gate: RankGate, *words: str) -> NoReturn:
    """The life of a rank that is a fork of the agent, with the arguments of `rank.main`; the gate is waited for."""

    def live() -> int:
        # What the agent has open is no rank's; its objects stay, so that none closes a descriptor of the handler's.
        gc.freeze()
        gate.pass_through()
        reset_signals()
        _close_descriptors()
        refresh()
        return rank.main(words)

    run_and_exit(live)


def run(order: SpawnWorker, status_fd: int) -> int:
    """The life of a group's agent; returns its exit code.

    The progress and the result of loading are reported on the socket `status_fd`.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    spec = order.spec
    assert spec.torchrun is not None
    board = GroupBoard(mailbox_name(order.prefix, order.batcher_index, order.worker_id, order.start_count))
    watch = GroupWatch(order, board, Channel(socket.socket(fileno=status_fd)))
    os.environ["OMP_NUM_THREADS"] = str(spec.torchrun["omp_number_threads"])
    words = [order.to_json()]
    arguments = torchrun_arguments(spec.torchrun, f"{spec.name}_{order.worker_id}")
    command = rank_command(spec.python or sys.executable, words)
    parsed = torchrun.parse_args([*arguments, "--no-python", *command])  # type: ignore[no-untyped-call]
    config, program, program_words = torchrun.config_from_args(parsed)
    rank_words: list[Any] = program_words
    if spec.python is None:
        program, rank_words = run_forked_rank, [RankGate(spec.ranks, watch.start), *words]
    else:
        watch.start()
    try:
        elastic_launch(config, program)(*rank_words)
    except ChildFailedError as error:
        failed = min(error.failures)
        print(f"Rank {failed} ended with {error.failures[failed].exitcode}: the group ends.", file=sys.stderr)
        return 1
    except RendezvousError as error:
        endpoint = spec.torchrun["rdzv_endpoint"] or "a port of this machine"
        print(
            f"The ranks of {spec.torchrun['nnodes']} machine(s) did not meet at {endpoint}: {error} "
            "Look at torchrun.rdzv-endpoint, rdzv-backend and nnodes in model-config.yaml.",
            file=sys.stderr,
        )
        return 1
    return 0
