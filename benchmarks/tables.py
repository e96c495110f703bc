"""The tables of `make bench-rivals`: each server with the configuration that it likes best, line by line.

A summary is what `summarise` makes: for each server, for each of its configurations, `load` with the medians of each
load's figures, and `idle_cpu_percent`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load import Load, failures
from reports import markdown, medians

#: The load generator was the limit, or close to it, from here on.
CLIENT_LIMIT_PERCENT = 90
NOTHING = "n/a"
#: No model server, but what HTTP alone can do: it is never the best of them.
CEILING = "granian"

#: For each server, for each of its configurations, its figures.
Summary = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Best:
    """The configuration that answers most requests, and its figures."""

    configuration: str
    figures: dict[str, float]


def summarise(rounds: dict[str, dict[str, list[dict[str, Any]]]]) -> Summary:
    """The medians over the rounds."""
    return {
        server: {configuration: _medians(found) for configuration, found in configurations.items() if found}
        for server, configurations in rounds.items()
    }


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    titles = [title for title in rounds[0]["load"] if all(title in each["load"] for each in rounds)]
    return {
        "idle_cpu_percent": statistics.median(each["idle_cpu_percent"] for each in rounds),
        "first_answer_s": statistics.median(each["first_answer_s"] for each in rounds),
        "load": {title: medians([each["load"][title] for each in rounds]) for title in titles},
    }


def best(configurations: dict[str, dict[str, Any]], title: str) -> Best | None:
    """What a server does best for a load; None where none of its configurations was measured with it."""
    found = [Best(name, figures["load"][title]) for name, figures in configurations.items() if title in figures["load"]]
    return max(found, key=lambda each: each.figures["per_second"], default=None)


def throughput_table(summary: Summary, loads: Sequence[Load], headings: dict[str, str]) -> str:
    """Requests per second, the best of the model servers in bold, and the part that differing heads leave."""
    lines = [["requests/s", *(headings[name] for name in summary)]]
    for load in loads:
        found = {name: best(configurations, load.title) for name, configurations in summary.items()}
        rates = [each.figures["per_second"] for name, each in found.items() if each and name != CEILING]
        most = max(rates, default=0.0)
        lines.append([load.title, *(_rate(summary[name], each, most) for name, each in found.items())])
        if load.heads == "distinct":
            equal = next((each.title for each in loads if each.heads == "equal"), "")
            lines.append(["… of equal heads", *(_share(each, load.title, equal) for each in summary.values())])
    return markdown(*lines)


def _rate(configurations: dict[str, dict[str, Any]], found: Best | None, most: float) -> str:
    if found is None:
        return NOTHING
    rate = found.figures["per_second"]
    text = f"**{rate:,.0f}**" if rate == most else f"{rate:,.0f}"
    if len(configurations) > 1:
        text += f" ({found.configuration})"
    if failures(found.figures):
        text += ", with failures"
    return text + (" †" if found.figures["client_cpu_percent"] >= CLIENT_LIMIT_PERCENT else "")


def _share(configurations: dict[str, dict[str, Any]], distinct: str, equal: str) -> str:
    first, second = best(configurations, distinct), best(configurations, equal)
    if first is None or second is None:
        return NOTHING
    return f"{first.figures['per_second'] / second.figures['per_second']:.0%}"


def cpu_table(summary: Summary, loads: Sequence[Load], headings: dict[str, str]) -> str:
    """CPU time per request in the configuration of the other table, and when idle; the least in bold.

    For the loads with heads it is the load generator's: whether it could be what limits the requests that differ.
    """
    lines = [["CPU time", *(headings[name] for name in summary)]]
    for load in loads:
        found = {name: best(configurations, load.title) for name, configurations in summary.items()}
        if load.heads:
            spent = [f"{each.figures['client_cpu_us']:,.0f}" if each else NOTHING for each in found.values()]
            lines.append([f"load generator, µs/request: {load.title}", *spent])
            continue
        values = {name: each.figures["cpu_us"] if each else None for name, each in found.items()}
        lines.append([f"µs/request: {load.title}", *_least(values, ",.0f")])
    idle = {name: min(each["idle_cpu_percent"] for each in found.values()) for name, found in summary.items()}
    lines.append(["% of a core when idle", *_least(idle, ".1f")])
    return markdown(*lines)


def _least(values: Mapping[str, float | None], form: str) -> list[str]:
    """The values as text, the least of the model servers' in bold."""
    least = min((value for name, value in values.items() if value is not None and name != CEILING), default=None)
    texts = [NOTHING if value is None else f"{value:{form}}" for value in values.values()]
    return [f"**{text}**" if value is not None and value == least else text
            for value, text in zip(values.values(), texts, strict=True)]  # fmt: skip
