"""What is measured of workflows: one function for each case, on a freshly started server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from archive_server import STORE, ArchiveServer, archive
from load import Load, failures, measure_load, memory_mb
from servers import BENCHMARKS, PROJECT, WORK, BenchmarkError, http_request

from flows.batch_handler import QUESTION
from flows.clients import ask, most_memory_mb

#: The figures of one case; the report takes the median of each over the rounds.
Figures = dict[str, float]

_FLOWS = BENCHMARKS / "flows"
_ECHO = BENCHMARKS / "apps" / "echo_handler.py"
_FOUR_MODELS = PROJECT / "examples" / "workflows" / "four_models" / "workflow.yaml"
_MODELS = {
    **{f"model{number}": _ECHO for number in range(1, 5)},
    "hop": _ECHO,
    "slow": _FLOWS / "slow_handler.py",
    "batch": _FLOWS / "batch_handler.py",
}
_LARGE_BYTES = 1_000_000
_LARGE_CLIENTS = 4
_CHAIN = 6
_HOPS = 4


def _chain(length: int) -> str:
    """A specification of so many models in a row, none of which waits for a batch."""
    names = [f"n{number}" for number in range(1, length + 1)]
    models = "".join(f"  {name}: {{url: hop.mar}}\n" for name in names)
    edges = "".join(f"  {name}: [{after}]\n" for name, after in zip(names, [*names[1:], ""], strict=True))
    return f"models:\n  batch-size: 1\n{models}dag:\n{edges}"


_SPECS = {
    "chain": _chain(_CHAIN),
    "hop": _chain(1),
    "hops": _chain(_HOPS),
    "branches": """\
models:
  left: {url: slow.mar}
  right: {url: slow.mar}
dag:
  pre_processing: [left, right]
  left: [join]
  right: [join]
""",
    "batches": """\
models:
  batched: {url: batch.mar, batch-size: 16, max-batch-delay: 5}
dag:
  batched: []
""",
}


def make_archives() -> None:
    """The models and the workflows, in the store of both servers."""
    for model, handler in _MODELS.items():
        archive(model, handler)
    _archive_workflow("four_models", _FOUR_MODELS)
    for name, text in _SPECS.items():
        path = WORK / f"{name}.yaml"
        path.write_text(text)
        _archive_workflow(name, path)


def _archive_workflow(name: str, spec: Path) -> None:
    command = [str(Path(sys.executable).parent / "torch-workflow-archiver"), "--force", "--workflow-name", name]
    command += ["--spec-file", str(spec), "--handler", str(_FLOWS / "functions.py"), "--export-path", str(STORE)]
    subprocess.run(command, check=True)


@dataclass(frozen=True)
class Case:
    """One line of the table, or two.

    Attributes:
        measure: the figures, with runs of so many seconds.
        lines: for each line of the table its title and what it says of the figures.
    """

    measure: Callable[[ArchiveServer, float], Figures]
    lines: Mapping[str, Callable[[Figures], str]]


def _register(server: ArchiveServer, seconds: float) -> Figures:
    return {"seconds": server.register_workflow("four_models")}


def _four_models(server: ArchiveServer, seconds: float) -> Figures:
    server.register_workflow("four_models")
    return ask(server, _path("four_models"), os.urandom(100), seconds)


def _chain_of_six(server: ArchiveServer, seconds: float) -> Figures:
    server.register_workflow("chain")
    return measure_load(server, Load("a chain of six", 64, 1000, path=_path("chain")), seconds)


def _branches(server: ArchiveServer, seconds: float) -> Figures:
    server.register_workflow("branches")
    return ask(server, _path("branches"), os.urandom(100), seconds)


def _hops(server: ArchiveServer, seconds: float) -> Figures:
    """What each node after the first adds to a request, and what memory requests under way take."""
    server.register_workflow("hop")
    server.register_workflow("hops")
    body = os.urandom(_LARGE_BYTES)
    before = memory_mb(server)
    one, all_of_them = (ask(server, _path(name), body, seconds) for name in ("hop", "hops"))
    most = most_memory_mb(server, _path("hops"), body, _LARGE_CLIENTS, seconds)
    return {
        "hop_ms": (all_of_them["p50_ms"] - one["p50_ms"]) / (_HOPS - 1),
        "p50_ms": all_of_them["p50_ms"],
        "one_p50_ms": one["p50_ms"],
        "asked": one["asked"] + all_of_them["asked"],
        "failed": one["failed"] + all_of_them["failed"],
        "memory_mb": most - before,
    }


def _batches(server: ArchiveServer, seconds: float) -> Figures:
    server.register_workflow("batches")
    figures = measure_load(server, Load("a node with batches", 64, 1000, path=_path("batches")), seconds)
    requests, batches = map(int, http_request("POST", server.inference + _path("batches"), QUESTION, _BYTES).split())
    if not batches:
        raise BenchmarkError(f"{server.name} has run no batch.")
    return {**figures, "batch": requests / batches}


_BYTES = {"Content-Type": "application/octet-stream"}


def _path(workflow: str) -> str:
    return f"/wfpredict/{workflow}"


def _p50(figures: Figures) -> str:
    failed = f", {figures['failed']:.0f} of {figures['asked']:.0f} failed" if figures["failed"] else ""
    return f"{figures['p50_ms']:,.2f} ms{failed}"


def _rate(figures: Figures) -> str:
    failed = failures(figures)
    return f"{figures['per_second']:,.0f}/s (p50 {figures['p50_ms']:.2f} ms, p99 {figures['p99_ms']:.2f} ms)" + (
        f", with {failed:.0f} failures" if failed else ""
    )


CASES = {
    "register": Case(
        _register,
        {"registering the four models: 16 processes in TorchServe, 15 here": lambda found: f"{found['seconds']:.2f} s"},
    ),
    "four-models": Case(_four_models, {"four models and two functions, 1 client, p50": _p50}),
    "chain": Case(_chain_of_six, {"a chain of six nodes, 1 KB, 64 clients": _rate}),
    "branches": Case(_branches, {"two branches of 50 ms and a join, 1 client, p50": _p50}),
    "hops": Case(
        _hops,
        {
            "1 MB through four nodes, 1 client, p50": _p50,
            "… each node after the first": lambda found: f"{found['hop_ms']:.2f} ms",
            f"… memory, {_LARGE_CLIENTS} clients": lambda found: f"{found['memory_mb']:,.0f} MB",
        },
    ),
    "batches": Case(
        _batches,
        {
            "a node of 5 ms with batches of at most 16, 1 KB, 64 clients": _rate,
            "… requests in a batch, mean": lambda found: f"{found['batch']:.1f}",
        },
    ),
}
