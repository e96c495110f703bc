"""`make bench-batching`: the adaptive batching rule beside fixed ones, in the simulation and on this machine.

    python benchmarks/bench_batching.py                     everything: about an hour and a half
    python benchmarks/bench_batching.py --quick             fewer rules, loads and seconds: five minutes
    python benchmarks/bench_batching.py --only simulated    or real

Simulated: for each cost curve and load the best of 141 fixed rules. Real: the server with a handler that sleeps for
a + b*n, under the adaptive rule and under fixed ones (`batchPolicy: fixed`, TorchServe's rule), and the best of
these. The figures go to benchmarks/results/batching-*.json, which `make chart` draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from archive_server import ArchiveServer, archive, archive_models, our_server
from batching.comparison import (
    ADAPTIVE,
    BATCH_SIZES,
    CURVES,
    DELAYS_MS,
    POOLS,
    Outcome,
    Verdict,
    fixed_rules,
    judge,
    loads,
    simulate,
)
from reports import failures_told, markdown, report, say
from servers import BENCHMARKS, BenchmarkError

from wsgi_ts.tune.simulation import Load, Model, Rule

HANDLER = BENCHMARKS / "batching" / "cost_handler.py"
CLIENT = BENCHMARKS / "batching" / "client.py"
SIMULATED, REAL = "simulated", "real"
#: What the client can keep up with on a machine that it shares with the server (requests a second).
MOST_PER_SECOND = 8000.0


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        requests: of each simulated run.
        batch_sizes: of the simulated fixed rules.
        delays_ms: of the same.
        real_delays_ms: of the real server's fixed rules, with the largest batch and with one as large as the clients.
        rounds: runs of each real rule, in turn; the medians count.
        seconds: the length of a real run.
        every: takes every so-manieth load.
    """

    requests: int
    batch_sizes: tuple[int, ...]
    delays_ms: tuple[float, ...]
    real_delays_ms: tuple[float, ...]
    rounds: int
    seconds: float
    every: int


FULL = Effort(20_000, BATCH_SIZES, DELAYS_MS, (0.0, 1.0, 2.0, 3.0, 5.0, 10.0), 3, 5.0, 1)
QUICK = Effort(5_000, (2, 8, 16, 32), (0.0, 1.0, 3.0, 10.0), (0.0, 3.0), 1, 2.0, 3)


def load_name(model: Model, load: Load) -> str:
    """A load for people."""
    if not load.rate:
        return f"{load.clients} client{'s' if load.clients > 1 else ''}"
    kept = f", {load.pool} kept connections" if load.pool else ""
    return f"{load.rate / model.capacity:.0%} of capacity{kept}"


def rule_name(rule: Rule) -> str:
    """A rule for people."""
    return f"at most {rule.batch_size}, {rule.max_delay_s * 1e3:g} ms"


def curve_name(model: Model) -> str:
    """A cost curve for people."""
    return f"{model.fixed_s * 1e3:g} + {model.per_request_s * 1e3:g}·n ms"


def chosen(model: Model, every: int) -> Iterator[Load]:
    """Every so-manieth load of a model."""
    yield from list(loads(model))[::every]


def row(model: Model, load: Load, verdict: Verdict) -> dict[str, Any]:
    """One line of the results."""
    return {
        "curve": curve_name(model), "load": load_name(model, load), "clients": load.clients,
        "part": load.rate / model.capacity, "pool": load.pool, "best": rule_name(verdict.best),
        "throughput": verdict.throughput, "p99": verdict.p99, "holds": verdict.holds,
        "ours": asdict(verdict.adaptive), "fixed": asdict(verdict.fixed),
    }  # fmt: skip


# -- simulated


def simulate_all(effort: Effort) -> list[dict[str, Any]]:
    """The verdicts of all loads, and of the random ones over kept connections, too."""
    rows = []
    rules = list(fixed_rules(effort.batch_sizes, effort.delays_ms))
    with ProcessPoolExecutor() as pool:
        for model in CURVES:
            for load in chosen(model, effort.every):
                asked = [load, *(Load(rate=load.rate, pool=kept) for kept in POOLS if load.rate)]
                ours = [pool.submit(simulate, ADAPTIVE, model, each, effort.requests) for each in asked]
                outcomes = pool.map(simulate, rules, *zip(*[(model, load, effort.requests)] * len(rules), strict=True))
                fixed = dict(zip(rules, outcomes, strict=True))
                for each, future in zip(asked, ours, strict=True):
                    outcome = future.result()
                    assert outcome is not None
                    rows.append(row(model, each, judge(dict(fixed), outcome)))
                    say(describe(rows[-1]))
    return rows


# -- real


def real_rules(load: Load, delays_ms: Sequence[float]) -> list[Rule]:
    """The adaptive rule and the fixed ones that have a chance, each once."""
    sizes = {32, min(load.clients, 32)} if load.clients else {32}
    fixed = [Rule("fixed", size, delay / 1e3) for size in sorted(sizes) for delay in delays_ms if size > 1 or not delay]
    return [ADAPTIVE, *fixed]


def model_name(model: Model, rule: Rule) -> str:
    """The archive of a cost curve with a rule."""
    words = f"{model.fixed_s * 1e6:.0f}-{model.per_request_s * 1e6:.0f}-{rule.policy}-{rule.batch_size}"
    return f"cost-{words}-{rule.max_delay_s * 1e3:.0f}"


def archive_rule(model: Model, rule: Rule) -> None:
    """Makes the archive of a cost curve with a rule."""
    config = {
        "minWorkers": 1, "maxWorkers": 1, "batchSize": rule.batch_size, "maxBatchDelay": round(rule.max_delay_s * 1e3),
        "batchPolicy": rule.policy, "jobQueueSize": 100_000,
        "cost": {"fixed_ms": model.fixed_s * 1e3, "per_request_ms": model.per_request_s * 1e3},
    }  # fmt: skip
    archive(model_name(model, rule), HANDLER, config=config)


def measure(server: ArchiveServer, name: str, load: Load, seconds: float) -> Outcome | None:
    """One run; None where an answer was wrong or missing, as when a rule cannot keep up."""
    host, port = server.inference.removeprefix("http://").split(":")
    amount = ("rate", f"{load.rate}") if load.rate else ("clients", f"{load.clients}")
    words = [sys.executable, str(CLIENT), host, port, server.path(name), *amount, f"{seconds}"]
    figures = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    if figures["failed"]:
        say(f"{figures['failed']:.0f} requests to {name} failed ({' '.join(amount)})")
        return None
    return Outcome(figures["per_second"], figures["p50_ms"] / 1e3, figures["p99_ms"] / 1e3)


def median(outcomes: Sequence[Outcome | None]) -> Outcome | None:
    """The median of each figure; None where a run failed."""
    figures = [asdict(each).values() for each in outcomes if each is not None]
    if len(figures) < len(outcomes):
        return None
    return Outcome(*(statistics.median(values) for values in zip(*figures, strict=True)))


def measure_all(effort: Effort) -> list[dict[str, Any]]:
    """The verdicts of the real server, for what the client can keep up with."""
    rows = []
    archive_models(("echo",))
    settings = {"enable_model_api": "true"}
    with our_server(batch_size=1, web_workers=1, settings=settings, models=("echo",)) as server:
        for model in CURVES:
            for load in chosen(model, effort.every):
                if load.rate > MOST_PER_SECOND:
                    continue
                rules = real_rules(load, effort.real_delays_ms)
                for rule in rules:
                    archive_rule(model, rule)
                outcomes: dict[Rule, list[Outcome | None]] = {rule: [] for rule in rules}
                with server.registered(*(model_name(model, rule) for rule in rules)):
                    for _ in range(effort.rounds):
                        for rule in rules:
                            outcomes[rule].append(measure(server, model_name(model, rule), load, effort.seconds))
                found = {rule: median(outcomes[rule]) for rule in rules}
                ours = found.pop(ADAPTIVE)
                if ours is None or not any(found.values()):
                    raise BenchmarkError(f"requests failed with {curve_name(model)}, {load_name(model, load)}")
                rows.append(row(model, load, judge(found, ours)))
                say(describe(rows[-1]))
    return rows


# -- reports


def describe(line: dict[str, Any]) -> str:
    """One line of progress."""
    return f"{line['curve']}, {line['load']}: {' | '.join(_cells(line))}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures in Markdown; bold is what falls short."""
    head = "batch", "load", "requests/s", "of the highest", "p99", "best fixed rule", "its p99", "p99, ours to its"
    return markdown(head, *((line["curve"], line["load"], *_cells(line)) for line in rows))


def _cells(line: dict[str, Any]) -> list[str]:
    ours, fixed = line["ours"], line["fixed"]
    ratios = [f"{line['throughput']:.3f}", f"{line['p99']:.2f}"]
    if not line["holds"]:
        ratios = [f"**{ratio}**" for ratio in ratios]
    return [
        f"{ours['throughput']:,.0f}", ratios[0], f"{ours['p99_s'] * 1e3:.2f} ms", line["best"],
        f"{fixed['p99_s'] * 1e3:.2f} ms", ratios[1],
    ]  # fmt: skip


def main() -> None:
    """Measures, and reports."""
    parser = argparse.ArgumentParser(description="Measures the adaptive batching rule beside fixed ones.")
    parser.add_argument("--only", choices=(SIMULATED, REAL), help="only this part")
    parser.add_argument("--quick", action="store_true", help="a first impression")
    given = parser.parse_args()
    effort = QUICK if given.quick else FULL
    parts = {SIMULATED: simulate_all, REAL: measure_all}
    with failures_told("bench-batching"):
        found = {}
        for name, part in parts.items():
            if given.only in (None, name):
                print(f"==> {name}", flush=True)
                found[name] = part(effort)
        text = "\n\n".join(f"{name}:\n\n{table(rows)}" for name, rows in found.items())
        report(text, {"options": asdict(effort), "summary": found}, "batching-")


if __name__ == "__main__":
    main()
