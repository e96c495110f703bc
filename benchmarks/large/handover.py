"""What a group adds to a batch: the same split model in a plain torchrun loop and behind the server.

One request is one batch. Three models take turns on one connection: the split model on two ranks, two ranks that
answer at once, and one process that answers at once. The difference of the last two is what telling the ranks and
hearing from them costs. For the split model the rest of the server (the single process) is taken off, and what is left
compared with the plain loop: one whose ranks pause before each batch, as ranks do that wait for requests, and one whose
ranks never pause.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from servers import BenchmarkError, Server, archive

from large.measuring import FOLDER, Client, Effort, Figures, markdown, quantile, say
from large.tensor_parallel import BODY_BYTES

RANKS = 2
SPLIT, EMPTY, SINGLE = "handover-split", "handover-empty", "handover-single"
TITLE = f"A group of {RANKS} ranks against the same ranks without a server"
#: Models take turns after so many requests, so that a machine that becomes slower does so for all.
_TURN = 50
_PAUSE_MS = 1


def make_archives() -> None:
    """The three models."""
    for model, ranks, split in ((SPLIT, RANKS, True), (EMPTY, RANKS, False), (SINGLE, 1, False)):
        make_ranks_archive(model, ranks, split=split)


def make_ranks_archive(model: str, ranks: int, *, split: bool) -> None:
    """An archive of `RanksHandler`.

    Args:
        model: its name.
        ranks: processes of its worker; 1 for a plain one.
        split: whether it runs the split model.
    """
    config: dict[str, object] = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "handler": {"split": split}}
    if ranks > 1:
        config |= {"parallelType": "tp", "torchrun": {"nproc-per-node": ranks, "OMP_NUMBER_THREADS": 1}}
    archive(model, FOLDER / "ranks_handler.py", config=config, extra_files=[FOLDER / "tensor_parallel.py"])


def measure(server: Server, effort: Effort) -> Figures:
    """One round, in microseconds."""
    loops = {"loop": run_plain_loop(effort.batches), "paused": run_plain_loop(effort.batches, _PAUSE_MS)}
    with server.registered(SPLIT, EMPTY, SINGLE):
        found = _ask_in_turns(server, effort.batches)
    figures: Figures = {}
    for title, durations in (*loops.items(), *found.items()):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            figures[f"{title}_{name}_us"] = quantile(durations, share) / 1e3
    # Medians only: a difference of two 99th percentiles is nobody's 99th percentile.
    single = figures[f"{SINGLE}_p50_us"]
    figures["told_us"] = figures[f"{EMPTY}_p50_us"] - single
    for loop in loops:
        figures[f"over_{loop}_us"] = figures[f"{SPLIT}_p50_us"] - single - figures[f"{loop}_p50_us"]
    say(f"a hand-over to {RANKS} ranks costs {figures['told_us'] / 1e3:.2f} ms; a split model takes "
        f"{figures['over_paused_us'] / 1e3:.2f} ms longer than in a loop with pauses, "
        f"{figures['over_loop_us'] / 1e3:.2f} ms longer than in one without")  # fmt: skip
    return figures


def run_plain_loop(count: int, pause_ms: float = 0) -> list[int]:
    """Nanoseconds of each of so many batches in torchrun, without a server.

    Args:
        count: how many.
        pause_ms: how long each rank sleeps before each.

    Raises:
        BenchmarkError: torchrun failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(FOLDER / "torchrun_loop.py"), str(count), str(pause_ms)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        raise BenchmarkError(f"torchrun failed:\n{done.stderr[-2000:]}")
    durations: list[int] = json.loads(lines[-1])
    return durations


def _ask_in_turns(server: Server, count: int) -> dict[str, list[int]]:
    """Nanoseconds from before each request to its answer, for each model."""
    body = bytes(BODY_BYTES)
    client = Client(server)
    found: dict[str, list[int]] = {SPLIT: [], EMPTY: [], SINGLE: []}
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

    def ms(name: str) -> str:
        return f"{figures[name] / 1e3:.2f} ms"

    return markdown(
        ("one batch", "time"),
        (f"1. a model split over {RANKS} ranks, plain torchrun loop, batch after batch", both("loop")),
        (f"2. the same loop with a pause of {_PAUSE_MS} ms before each batch", both("paused")),
        ("3. the same model behind the server, request to answer", both(SPLIT)),
        (f"4. {RANKS} ranks that answer at once, request to answer", both(EMPTY)),
        ("5. one process that answers at once, request to answer", both(SINGLE)),
        ("**the hand-over: telling the ranks and hearing from them** (4 less 5)", f"**{ms('told_us')}**"),
        ("the split model behind the server (3 less 5) against the loop with pauses (2)", ms("over_paused_us")),
        ("the same against the loop without (1)", ms("over_loop_us")),
    )
