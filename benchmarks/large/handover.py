"""What a group adds to a batch: a model split over two ranks against the whole of it in one process.

Each of the two runs in a plain torchrun loop and behind the server, where one request is one batch. What the server
takes on top of the loop is compared: the difference is what the group adds, whatever waiting, waking and HTTP cost on
this machine. The same models without any work, which answer at once, show the messages between the ranks alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from archive_server import ArchiveServer, archive
from reports import markdown, say
from servers import BenchmarkError

from large.measuring import FOLDER, Client, Effort, Figures, quantile
from large.tensor_parallel import BODY_BYTES

RANKS = 2
SPLIT, WHOLE, EMPTY, SINGLE = "handover-split", "handover-whole", "handover-empty", "handover-single"
TITLE = f"What a group of {RANKS} ranks adds to a batch"
#: Models take turns after so many requests, so that a machine that becomes slower does so for all.
_TURN = 50


def make_archives() -> None:
    """The four models."""
    for model, ranks, runs_model in ((SPLIT, RANKS, True), (WHOLE, 1, True), (EMPTY, RANKS, False), (SINGLE, 1, False)):
        make_ranks_archive(model, ranks, runs_model=runs_model)


def make_ranks_archive(model: str, ranks: int, *, runs_model: bool) -> None:
    """An archive of `RanksHandler`.

    Args:
        model: its name.
        ranks: processes of its worker; 1 for a plain one.
        runs_model: whether there is a model in it.
    """
    config: dict[str, object] = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "handler": {"model": runs_model}}
    if ranks > 1:
        config |= {"parallelType": "tp", "torchrun": {"nproc-per-node": ranks, "OMP_NUMBER_THREADS": 1}}
    archive(model, FOLDER / "ranks_handler.py", config=config, extra_files=[FOLDER / "tensor_parallel.py"])


def measure(server: ArchiveServer, effort: Effort) -> Figures:
    """One round, in microseconds."""
    loops = {"split_loop": run_plain_loop(RANKS, effort.batches), "whole_loop": run_plain_loop(1, effort.batches)}
    with server.registered(SPLIT, WHOLE, EMPTY, SINGLE):
        found = _ask_in_turns(server, effort.batches)
    figures: Figures = {}
    for title, durations in (*loops.items(), *found.items()):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            figures[f"{title}_{name}_us"] = quantile(durations, share) / 1e3
    # Medians only: a difference of two 99th percentiles is nobody's 99th percentile.
    of_split = figures[f"{SPLIT}_p50_us"] - figures["split_loop_p50_us"]
    of_whole = figures[f"{WHOLE}_p50_us"] - figures["whole_loop_p50_us"]
    figures["added_us"] = of_split - of_whole
    figures["told_us"] = figures[f"{EMPTY}_p50_us"] - figures[f"{SINGLE}_p50_us"]
    say(f"a group of {RANKS} ranks adds {figures['added_us'] / 1e3:.2f} ms to a batch, "
        f"{figures['told_us'] / 1e3:.2f} ms where the handler does nothing")  # fmt: skip
    return figures


def run_plain_loop(processes: int, count: int) -> list[int]:
    """Nanoseconds of each of so many batches in torchrun, without a server.

    Args:
        processes: among how many the model is split; 1 for the whole of it.
        count: how many batches.

    Raises:
        BenchmarkError: torchrun failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(FOLDER / "torchrun_loop.py"), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        raise BenchmarkError(f"torchrun failed:\n{done.stderr[-2000:]}")
    durations: list[int] = json.loads(lines[-1])
    return durations


def _ask_in_turns(server: ArchiveServer, count: int) -> dict[str, list[int]]:
    """Nanoseconds from before each request to its answer, for each model."""
    body = bytes(BODY_BYTES)
    client = Client(server)
    found: dict[str, list[int]] = {SPLIT: [], WHOLE: [], EMPTY: [], SINGLE: []}
    for turn in range(-1, -(-count // _TURN)):  # the first turn warms up
        for model, durations in found.items():
            for _ in range(_TURN):
                began = time.perf_counter_ns()
                client.ask(model, body)
                if turn >= 0:
                    durations.append(time.perf_counter_ns() - began)
    client.close()
    return found


def table(figures: Figures) -> str:
    """The figures of a round, or their medians, in Markdown."""

    def both(title: str) -> str:
        return f"p50 {figures[f'{title}_p50_us'] / 1e3:.2f} ms, p99 {figures[f'{title}_p99_us'] / 1e3:.2f} ms"

    return markdown(
        ("one batch", "time"),
        (f"1. a model split over {RANKS} ranks, torchrun loop", both("split_loop")),
        ("2. the same behind the server, request to answer", both(SPLIT)),
        ("3. the whole model in one process, loop", both("whole_loop")),
        ("4. the same behind the server, request to answer", both(WHOLE)),
        (f"5. {RANKS} ranks that answer at once, request to answer", both(EMPTY)),
        ("6. one process that answers at once, request to answer", both(SINGLE)),
        ("**added by the group** (2 less 1, less 4 less 3)", f"**{figures['added_us'] / 1e3:.2f} ms**"),
        ("of that, telling the ranks and hearing from them (5 less 6)", f"{figures['told_us'] / 1e3:.2f} ms"),
    )
