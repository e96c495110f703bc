"""Finds the setting: predicts what each would serve, then measures the most promising ones on the running server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from wsgi_ts.errors import ServerError
from wsgi_ts.tune.generator import Generator
from wsgi_ts.tune.objective import Objective, percentile
from wsgi_ts.tune.prediction import Curve, best_rate
from wsgi_ts.tune.served_model import ServedModel, Setting

#: Where two settings serve the same but for this part, the one that takes less is taken.
_SAME = 0.03
#: So many settings are measured, besides the present one.
FINALISTS = 3
#: A run has as many requests as a 99th percentile needs, and lasts so long at least and at most, in seconds.
_REQUESTS = 600
_SHORTEST_S, _LONGEST_S = 3.0, 12.0
_WARM_UP_S = 1.0
#: Steps from rates that were too high, one after the other, and from one that was served.
_DOWN, _UP = (0.9, 0.85, 0.75, 0.6), 1.1
#: Parts of the chosen setting's rate at which its latency is measured, too.
LIGHT_LOADS = (0.25, 0.6)


@dataclass(frozen=True)
class Point:
    """One setting at one load, measured.

    Attributes:
        rate: requests a second that came.
        throughput: answers a second.
        p99_s: their 99th percentile, in seconds.
        goodput: the part of them that the objective counts, a second.
        predicted: the goodput that was predicted for the setting.
        holds: whether all limits were kept.
        latencies_s: sorted; a request that failed is infinitely late.
    """

    setting: Setting
    rate: float
    throughput: float
    p99_s: float
    goodput: float
    predicted: float
    holds: bool
    latencies_s: list[float]


@dataclass(frozen=True)
class Candidate:
    """A setting, the curve that it is predicted by, and the goodput that it is predicted to have."""

    setting: Setting
    curve: Curve
    predicted: float


def candidates(
    curves: list[Curve], present: Setting, objective: Objective, tell: Callable[[str], None], until: float
) -> list[Candidate]:
    """Predicts the goodput of the settings that can be meant, the best first.

    The rule and delay of `present`, what holds now, are kept where they serve as well as others. It ends at `until`
    (monotonic seconds) with what there is.
    """
    found: list[Candidate] = []
    best = 0.0

    def promise(curve: Curve) -> float:
        return max((curve.capacity(size) for size, seconds in curve.sizes if seconds <= objective.longest_s), default=0)

    # The most promising ones first: what cannot reach the best so far is dropped without a simulation.
    for curve in sorted(curves, key=promise, reverse=True):
        sizes = sorted({size for size, seconds in curve.sizes if seconds <= objective.longest_s} | _between(curve))
        for size in reversed(sizes):
            if time.monotonic() > until and found:
                return _ordered(found)
            setting = Setting(curve.workers, curve.threads, size, "adaptive", present.delay_ms)
            # What is not nearly as good as the best so far is not of interest to the last percent.
            rate = best_rate(curve, setting, objective, 0.8 * best)
            if rate:
                found.append(Candidate(setting, curve, rate))
                best = max(best, rate)
        tell(f"{len(found)} settings keep the limits at some rate, the best at {best:.0f} requests a second")
    if found and time.monotonic() < until:
        found += _other_rules(max(found, key=lambda each: each.predicted), objective)
    return _ordered(found)


def _between(curve: Curve) -> set[int]:
    """Sizes between those that were measured."""
    largest = curve.largest
    return {size for power in range(largest.bit_length()) for size in (1 << power, 3 << power) if size <= largest}


def _other_rules(best: Candidate, objective: Objective) -> list[Candidate]:
    longest_ms = objective.longest_s * 1e3
    rules = [("none", best.setting.delay_ms)]
    rules += [("fixed", delay) for delay in sorted({max(1, int(longest_ms * part)) for part in (0.05, 0.2)})]
    found = []
    for policy, delay_ms in rules:
        setting = replace(best.setting, policy=policy, delay_ms=delay_ms)
        # The adaptive rule does what is right at other loads, too: another one has to serve clearly more.
        rate = best_rate(best.curve, setting, objective, (1 + 2 * _SAME) * best.predicted)
        if rate:
            found.append(Candidate(setting, best.curve, rate))
    return found


def _ordered(found: list[Candidate]) -> list[Candidate]:
    """By what they serve; of those that serve the same the one that takes less."""
    if not found:
        return []
    step = 1 + _SAME

    def key(each: Candidate) -> tuple[float, int, int]:
        return -math.floor(math.log(each.predicted, step)), each.setting.workers, each.setting.batch_size

    return sorted(found, key=key)


@dataclass
class Verifier:
    """Measures settings on the running server.

    Attributes:
        until: when no run is begun any more (monotonic seconds).
        warnings: what makes the figures doubtful.
    """

    model: ServedModel
    generator: Generator
    objective: Objective
    until: float
    tell: Callable[[str], None]
    points: list[Point] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def verify(self, candidate: Candidate) -> Point | None:
        """Finds the highest rate that a setting serves within all limits, near the one that was predicted.

        Returns:
            The point of it; None where none was found in time, or its workers do not start.
        """
        try:
            self.model.put(candidate.setting)
        except ServerError as error:
            self.warnings.append(f"{candidate.setting} cannot be tried: {error.message}")
            return None
        best: Point | None = None
        rate, downs = candidate.predicted, list(_DOWN)
        while self.has_time(rate):
            point = self.measure(candidate, rate)
            if point.holds:
                best = point
                if len(downs) < len(_DOWN) or rate > 1.5 * candidate.predicted:
                    break
                rate *= _UP
            elif best is not None or not downs:
                break
            else:
                rate *= downs.pop(0)
        return best

    def has_time(self, rate: float) -> bool:
        """Whether a run at a rate ends in time; the first setting is measured until it keeps the limits."""
        is_first = not any(point.holds or point.setting != self.points[0].setting for point in self.points)
        return is_first or time.monotonic() + _WARM_UP_S + _seconds(rate) < self.until

    def measure(self, candidate: Candidate, rate: float) -> Point:
        """Measures a setting, which holds, at a rate."""
        found = self.generator.at_random(rate, _seconds(rate), _WARM_UP_S)
        self.warnings += found.warnings
        latencies = [*found.latencies_s, *[math.inf] * found.failed]
        point = Point(
            candidate.setting,
            rate,
            found.throughput,
            percentile(latencies, 99),
            found.throughput * self.objective.share(latencies),
            candidate.predicted,
            self.objective.holds(latencies),
            latencies,
        )
        self.points.append(point)
        if found.failed:
            self.warnings.append(f"above what it serves requests fail: {found.refusal.rstrip('.')}")
        kept = "within the limits" if point.holds else "too late: " + _broken(self.objective, latencies)
        self.tell(f"{candidate.setting}: {rate:.0f} requests a second, p99 {_ms(point.p99_s)}, {kept}")
        return point


def _seconds(rate: float) -> float:
    return min(_LONGEST_S, max(_SHORTEST_S, _REQUESTS / rate))


def _broken(objective: Objective, latencies: list[float]) -> str:
    return ", ".join(f"{each.text} is {_ms(each.value_s(latencies))}" for each in objective.broken(latencies))


def _ms(seconds: float) -> str:
    return "without end" if math.isinf(seconds) else f"{seconds * 1e3:.1f} ms"


def pareto(points: list[Point]) -> set[int]:
    """The places of the points than which none serves more in no more time."""
    return {
        place
        for place, point in enumerate(points)
        if math.isfinite(point.p99_s)
        and not any(
            other.throughput >= point.throughput
            and other.p99_s <= point.p99_s
            and (other.throughput, other.p99_s) != (point.throughput, point.p99_s)
            for other in points
        )
    }
