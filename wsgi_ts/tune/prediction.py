"""What a setting will serve within the limits: the server's scheduler, simulated with the costs that were learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from statistics import fmean

from wsgi_ts.tune.load import KEPT
from wsgi_ts.tune.objective import Objective, percentile
from wsgi_ts.tune.served_model import Setting
from wsgi_ts.tune.simulation import Load, Model, Rule, Simulation

#: A simulated run is so many seconds long, for a queue needs time to grow, and has so many requests at least and most.
_RUN_S = 1.5
_FEWEST, _MOST = 1500, 5000
#: Before them come so many that do not count, as a part of them.
_WARM_UP = 0.15
#: The rate is found to this part of what the workers can do.
_PRECISION = 0.01
#: Of the latencies that were measured around a batch so many are kept, evenly over their distribution.
_NOISE_STEPS = 200


@dataclass(frozen=True)
class Curve:
    """What batches of `workers` model workers, all busy, cost.

    Attributes:
        sizes: the sizes that were measured, and the seconds of each.
        overhead_s: what a request takes besides, on its way there and back.
        noise: for each of the sizes what single batches took, as parts of that.
    """

    workers: int
    threads: int
    sizes: tuple[tuple[int, float], ...]
    overhead_s: float
    noise: tuple[tuple[float, ...], ...]

    @property
    def line(self) -> tuple[float, float]:
        """The a and b of a + b·n, in seconds, that fit best, the short batches as well as the long ones."""
        if len(self.sizes) == 1:
            size, seconds = self.sizes[0]
            return 0.0, seconds / size
        # Each point counts by the inverse of its square: what matters is by which part of it the line is off.
        weights = [1 / seconds**2 for _, seconds in self.sizes]
        total = sum(weights)
        mean_n = sum(w * n for w, (n, _) in zip(weights, self.sizes, strict=True)) / total
        mean_s = sum(w * s for w, (_, s) in zip(weights, self.sizes, strict=True)) / total
        spread = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, self.sizes, strict=True))
        together = sum(w * (n - mean_n) * (s - mean_s) for w, (n, s) in zip(weights, self.sizes, strict=True))
        slope = min(max(0.0, together / spread), mean_s / mean_n)
        return mean_s - slope * mean_n, slope

    @property
    def largest(self) -> int:
        """The largest batch that was measured."""
        return self.sizes[-1][0]

    def capacity(self, batch_size: int) -> float:
        """Requests a second with full batches."""
        return self.workers * self.model(batch_size).capacity

    def model(self, batch_size: int) -> Model:
        """The cost of batches for the simulation."""
        fixed_s, per_request_s = self.line
        return Model(fixed_s, per_request_s, batch_size, self.sizes)

    def alone_s(self) -> list[float]:
        """The latencies of requests that nobody else is beside, sorted, in seconds."""
        seconds = self.model(1).cost_s(1)
        return sorted(self.overhead_s + seconds * factor for factor in self.noise[0])

    def noise_at(self, batch_size: int) -> tuple[float, ...]:
        """What single batches of about that size took: long ones are off by less, in parts of what they take."""
        nearest = min(range(len(self.sizes)), key=lambda place: abs(log2(self.sizes[place][0] / batch_size)))
        return self.noise[nearest]


def noise_of(latencies_s: Sequence[float], overhead_s: float) -> tuple[float, ...]:
    """How far single batches are from the mean of all, by the latencies of a run with equal batches."""
    # The mean, since the server measures means: the simulated workers are as busy as the real ones.
    usual = max(1e-6, fmean(latencies_s) - overhead_s)
    count = min(_NOISE_STEPS, len(latencies_s))
    steps = [percentile(latencies_s, 100 * (step + 0.5) / count) for step in range(count)]
    return tuple(max(0.1, (each - overhead_s) / usual) for each in steps)


def latencies_s(curve: Curve, setting: Setting, rate: float, objective: Objective | None = None) -> list[float]:
    """The latencies of requests that come at random, so many a second, sorted, in seconds.

    A run that does not keep the objective, if one is given, ends as soon as that is sure.
    """
    requests = int(min(_MOST, max(_FEWEST, _RUN_S * rate)))
    warm_up = int(_WARM_UP * requests)
    rule = Rule(setting.policy, setting.batch_size, setting.delay_ms / 1000)
    simulation = Simulation(
        rule,
        curve.model(setting.batch_size),
        Load(rate=rate, pool=KEPT),
        workers=curve.workers,
        noise=curve.noise_at(setting.batch_size),
    )
    # All is compared in time on the server; what a request takes on its way comes on top.
    if objective is None:
        found = simulation.latencies_s(requests, warm_up)
    else:
        strictest = max(objective.terms, key=lambda term: term.percent)
        found = simulation.latencies_s(
            requests,
            warm_up,
            give_up_above_s=strictest.limit_s - curve.overhead_s,
            most_late=int(requests * (1 - strictest.percent / 100)) if strictest.percent else requests,
        )
    return [each + curve.overhead_s for each in found]


def best_rate(curve: Curve, setting: Setting, objective: Objective, at_least: float = 0.0) -> float:
    """The most requests a second that a setting serves within all limits; 0.0 where it keeps them at no rate.

    Less than `at_least` is of no interest: 0.0 is returned for it at once.
    """
    capacity = curve.capacity(setting.batch_size)
    lowest, highest = 0.02 * capacity, capacity
    if at_least > capacity:
        return 0.0
    lowest = max(lowest, at_least)
    if not objective.holds(latencies_s(curve, setting, lowest, objective)):
        return 0.0
    while highest - lowest > _PRECISION * capacity:
        middle = (lowest + highest) / 2
        if objective.holds(latencies_s(curve, setting, middle, objective)):
            lowest = middle
        else:
            highest = middle
    return lowest
