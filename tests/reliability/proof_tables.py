"""The tables of docs/reliability.md, from what `prove` has found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reports import markdown

from reliability.campaign import Findings
from reliability.measures import OVERLOAD, Drain, Ends, Overload, Slow, Soak
from reliability.slow_clients import SLOW_CLIENTS
from reliability.subjects import Ours

MISSING = "not measured"
#: What is found in each step, in the order of the tables.
STEPS: Mapping[str, type[Any]] = {
    "kills": Findings,
    "drain": Drain,
    "ends": Ends,
    "overload": Overload,
    "slow": Slow,
    "soak": Soak,
}
#: How many times as long the slowest answers may take beside slow clients.
SLOW_LIMIT = 2.0
Found = Mapping[str, Mapping[str, Any]]


def none_of(count: int, total: int) -> str:
    """So many of so many; of none the 95 % upper bound of how often it happens, which is about three in n."""
    if count or not total:
        return f"{count:,} of {total:,}"
    return f"0 of {total:,} (< {_significant(100 * (1 - 0.05 ** (1 / total)))} %)"


def _significant(value: float) -> str:
    return f"{value:.1g}" if value < 1 else f"{value:.0f}"


def median_and_worst(values: Sequence[float]) -> str:
    """In seconds."""
    return f"{statistics.median(values):.2f} / {max(values):.2f}" if values else "-"


def brief(found: Any) -> str:
    """One line of progress."""
    rows = next(rows for kind, rows in _ROWS.items() if isinstance(found, kind))
    return "; ".join(f"{title}: {cell(found)}" for title, cell in rows)


def render(found: Found, faults: Mapping[str, Mapping[str, Sequence[str]]], how: str) -> str:
    """All tables.

    Args:
        found: for each server, what was found in each step.
        faults: for each module of tests, which passed, failed and were skipped.
        how: the command, the seed, how long it took.
    """
    parts = [f"By {how}.", _beside_each_other(found)]
    ours = found.get(Ours.name, {}).get("kills")
    if ours is not None:
        parts += ["What was killed of wsgi-ts:", _by_role(ours)]
    if faults:
        parts += ["All other faults, wsgi-ts:", _fault_table(faults)]
    troubles = [f"* {name}: {text}" for name, rows in found.items() for text in rows.get("troubles", ())]
    if troubles:
        parts += ["Could not be measured:", "\n".join(troubles)]
    return "\n\n".join(parts)


def _beside_each_other(found: Found) -> str:
    lines = [["", *found]]
    for step, kind in STEPS.items():
        for title, cell in _ROWS[kind]:
            rows = [row.get(step) for row in found.values()]
            lines.append([title, *(MISSING if row is None else cell(row) for row in rows)])
    return markdown(*lines)


def _by_role(ours: Findings) -> str:
    lines = [["process", "killed", "whole again, s, median / worst", "told of an error, s, median / worst"]]
    for role, count in sorted(ours.kills.items()):
        lines.append(
            [role, str(count), median_and_worst(ours.back.get(role, [])), median_and_worst(ours.told.get(role, []))]
        )
    return markdown(*lines)


def _fault_table(faults: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    lines = [["tests", "held", "failed", "skipped"]]
    for module, rows in sorted(faults.items()):
        held, failed = len(rows["passed"]), rows["failed"]
        skipped = "; ".join(rows["skipped"]).replace("|", "/")
        lines.append([f"`{module}`", f"{held} of {held + len(failed)}", ", ".join(failed) or "-", skipped or "-"])
    return markdown(*lines)


def _of(kills: Findings, *results: str) -> str:
    taken = sum(kills.results.values()) - kills.results.get("refused", 0)
    return none_of(sum(kills.results.get(each, 0) for each in results), taken)


def _all(values: Mapping[str, Sequence[float]]) -> list[float]:
    return [each for times in values.values() for each in times]


def slow_factor(slow: Slow) -> str:
    """The factor, and whether it is kept."""
    if not slow.alone_s or not slow.beside_s:
        return "no answers"
    factor = slow.beside_s / slow.alone_s
    times = f"{1000 * slow.alone_s:.1f} to {1000 * slow.beside_s:.1f} ms"
    return f"{factor:.2f} ({times})" + ("" if factor <= SLOW_LIMIT else ": falls short")


def _left(names: Sequence[str]) -> str:
    return "nothing" if not names else str(len(names))


_KILLS: Sequence[tuple[str, Callable[[Findings], str]]] = (
    ("SIGKILLs under load, of all kinds of process", lambda kills: f"{sum(kills.kills.values()):,}"),
    ("wrong answers, of the requests meanwhile", lambda kills: _of(kills, "wrong")),
    ("requests that hang", lambda kills: _of(kills, "hang")),
    ("requests that ran twice", lambda kills: none_of(kills.twice, sum(kills.results.values()))),
    ("answered well", lambda kills: _of(kills, "ok")),
    ("cut off for each kill, mean / most (of 4 clients)", lambda kills: f"{kills.cut_mean:.2f} / {kills.cut_max}"),
    (
        "kills after which it had to be started by hand (main process aside)",
        lambda kills: none_of(kills.by_hand, sum(count for role, count in kills.kills.items() if role not in MAIN)),
    ),
    ("whole again by itself, s, median / worst", lambda kills: median_and_worst(_all(kills.back))),
    (
        "a model worker is killed: its requests are told, s, median / worst",
        lambda kills: median_and_worst(kills.told.get("model-worker", [])),
    ),
)  # fmt: skip
_DRAIN: Sequence[tuple[str, Callable[[Drain], str]]] = (
    ("SIGTERM: requests under way that are answered", lambda drain: f"{drain.answered} of {drain.under_way}"),
)
_ENDS: Sequence[tuple[str, Callable[[Ends], str]]] = (
    ("SIGTERM: processes and names that stay", lambda ends: _left(ends.after_term)),
    ("main process killed: processes that live 2 s later", lambda ends: _left(ends.after_kill)),
    ("main process killed: names in /dev/shm after the next start", lambda ends: _left(ends.after_start)),
)
_OVERLOAD: Sequence[tuple[str, Callable[[Overload], str]]] = (
    (
        f"{OVERLOAD} times its capacity: good answers, of the capacity",
        lambda load: f"{100 * load.goodput / load.capacity:.0f} % of {load.capacity:.0f}/s",
    ),
    (f"{OVERLOAD} times: a good answer takes, s, p99", lambda load: f"{load.good_s:.2f}"),
    (
        f"{OVERLOAD} times: a refusal takes, ms, p99",
        lambda load: "none refused" if load.refused_s is None else f"{1000 * load.refused_s:.0f}",
    ),
    (
        f"{OVERLOAD} times: Retry-After says / the queue takes, s",
        lambda load: "none" if load.retry_said_s is None else f"{load.retry_said_s:.0f} / {load.wait_s:.1f}",
    ),
    (f"{OVERLOAD} times: requests that are never answered", lambda load: f"{load.unanswered:,}"),
)
_SOAK: Sequence[tuple[str, Callable[[Soak], str]]] = (
    ("soak: minutes, requests", lambda soak: f"{soak.seconds / 60:.1f}, {soak.requests:,}"),
    ("soak: requests that were not answered well", lambda soak: none_of(soak.bad, soak.requests + soak.bad)),
    ("soak: models that came and went", lambda soak: f"{soak.registered:,}"),
    (
        "soak: growth of memory, MB an hour (95 % upper bound)",
        lambda soak: f"{soak.slope / 1e6:.1f} ({soak.slope_upper / 1e6:.1f})",
    ),
    (
        "soak: more descriptors / threads / processes / names at the end",
        lambda soak: f"{soak.descriptors} / {soak.threads} / {soak.processes} / {soak.names}",
    ),
)
_SLOW: Sequence[tuple[str, Callable[[Slow], str]]] = (
    (
        f"beside {SLOW_CLIENTS} clients that send a byte a second: p99, times that without (at most {SLOW_LIMIT:g})",
        slow_factor,
    ),
    ("beside them: requests that were not answered well", lambda slow: none_of(slow.bad, slow.requests)),
)
_ROWS: Mapping[type, Sequence[tuple[str, Callable[[Any], str]]]] = {
    Findings: _KILLS,
    Drain: _DRAIN,
    Ends: _ENDS,
    Overload: _OVERLOAD,
    Slow: _SLOW,
    Soak: _SOAK,
}
#: The processes that somebody has to start again when they are killed: a service manager does.
MAIN = ("guard", "main")
