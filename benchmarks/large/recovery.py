"""Time without answers after a rank was killed: from the SIGKILL to the first 200, for each rank of a group in turn."""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress

import psutil
from archive_server import ArchiveServer
from reports import markdown, say
from servers import BenchmarkError

from large.handover import make_ranks_archive
from large.measuring import Client, Effort, Figures
from large.tensor_parallel import BODY_BYTES

GROUPS = (2, 4)
TITLE = "From `kill -9` of a rank to the first answer"
_LIMIT_S = 120.0
_ASK_EVERY_S = 0.005


def make_archives() -> None:
    """A group of each size."""
    for ranks in GROUPS:
        make_ranks_archive(_model(ranks), ranks, runs_model=True)


def _model(ranks: int) -> str:
    return f"recovery-{ranks}"


def measure(server: ArchiveServer, effort: Effort) -> Figures:
    """One round, in seconds; how much effort makes no difference."""
    figures: Figures = {}
    for ranks in GROUPS:
        model = _model(ranks)
        with server.registered(model):
            for rank in range(ranks):
                wait_for_answer(server, model)
                figures[f"{ranks}_{rank}_s"] = kill_and_wait(server, model, ranks, rank)
                say(f"{ranks} ranks: back {figures[f'{ranks}_{rank}_s']:.2f} s after the death of rank {rank}")
    return figures


def kill_and_wait(server: ArchiveServer, model: str, ranks: int, rank: int) -> float:
    """Seconds from killing a rank to the first answer.

    Raises:
        BenchmarkError: the group was not there, or one of its ranks outlived the death.
    """
    before = rank_processes(server, model)
    if sorted(before) != list(range(ranks)):
        raise BenchmarkError(f"{model} has the ranks {sorted(before)} instead of {ranks}")
    began = time.monotonic()
    before[rank].send_signal(signal.SIGKILL)
    wait_for_answer(server, model)
    took = time.monotonic() - began
    after = rank_processes(server, model)
    if {process.pid for process in before.values()} & {process.pid for process in after.values()}:
        raise BenchmarkError(f"{model}: a rank outlived the death of rank {rank}")
    return took


def wait_for_answer(server: ArchiveServer, model: str) -> None:
    """Asks until a 200 comes.

    Raises:
        BenchmarkError: none came in time.
    """
    deadline = time.monotonic() + _LIMIT_S
    while True:
        client = Client(server)
        try:
            client.ask(model, bytes(BODY_BYTES))
            return
        except BenchmarkError as error:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{model} has not come back within {_LIMIT_S:.0f} s: {error}") from error
            time.sleep(_ASK_EVERY_S)
        finally:
            client.close()


def rank_processes(server: ArchiveServer, model: str) -> dict[int, psutil.Process]:
    """The processes of a model's group, by rank; their titles tell."""
    found: dict[int, psutil.Process] = {}
    for process in server.processes():
        with suppress(psutil.NoSuchProcess):
            title = re.match(rf"wsgi-ts: rank (\d+) of \d+ {re.escape(model)} ", " ".join(process.cmdline()))
            if title:
                found[int(title[1])] = process
    return found


def table(figures: Figures) -> str:
    """The figures of a round, or their medians, in Markdown."""
    return markdown(
        ("killed", *(f"a group of {ranks}" for ranks in GROUPS)),
        *(
            (f"rank {rank}", *(f"{figures[f'{ranks}_{rank}_s']:.1f} s" if rank < ranks else "" for ranks in GROUPS))
            for rank in range(max(GROUPS))
        ),
    )
