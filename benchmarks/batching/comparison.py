"""The adaptive rule beside the best fixed one, load by load, in the simulation.

The best fixed rule of a load is the one with the lowest p99 of those whose throughput is within 2 % of the highest that
any of them has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from wsgi_ts.tune.simulation import Load, Model, Rule, Simulation

#: The cost curves that the rules are compared at: a small model on the CPU, an accelerator, a large model.
CURVES = (Model(0.0002, 0.00005), Model(0.005, 0.0001), Model(0.020, 0.001))
#: What the adaptive rule may lose.
LEAST_THROUGHPUT = 0.98
MOST_P99 = 1.15

CLIENTS = (1, 2, 4, 8, 16, 32, 48, 64)
#: Parts of the capacity that is asked for at random times.
PARTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Kept connections that these requests come over.
POOLS = (16, 64, 256)
BATCH_SIZES = (2, 3, 4, 6, 8, 12, 16, 20, 24, 32)
DELAYS_MS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0)
ADAPTIVE = Rule()


@dataclass(frozen=True)
class Outcome:
    """What came out: requests a second, percentiles of the latency in seconds."""

    throughput: float
    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class Verdict:
    """What the adaptive rule comes to at one load.

    Attributes:
        best: the best fixed rule, `fixed` what it comes to.
        adaptive: what ours comes to.
        throughput: ours, as a part of the highest of all fixed rules.
        p99: ours, in parts of that of the best fixed rule.
    """

    best: Rule
    fixed: Outcome
    adaptive: Outcome
    throughput: float
    p99: float

    @property
    def holds(self) -> bool:
        """Whether the adaptive rule is as good as the best fixed one, but for what it may lose."""
        return self.throughput >= LEAST_THROUGHPUT and self.p99 <= MOST_P99


def fixed_rules(batch_sizes: Iterable[int] = BATCH_SIZES, delays_ms: Iterable[float] = DELAYS_MS) -> Iterator[Rule]:
    """The fixed rules of a sweep, batch size 1 among them."""
    yield Rule("fixed", 1, 0.0)
    for batch_size in batch_sizes:
        for delay_ms in delays_ms:
            yield Rule("fixed", batch_size, delay_ms / 1e3)


def loads(model: Model) -> Iterator[Load]:
    """All loads of a model: clients that wait for their answers, then requests at random times."""
    yield from (Load(clients=clients) for clients in CLIENTS)
    yield from (Load(rate=part * model.capacity) for part in PARTS)


def points() -> Iterator[tuple[Model, Load]]:
    """All loads of all cost curves."""
    for model in CURVES:
        for load in loads(model):
            yield model, load


def simulate(rule: Rule, model: Model, load: Load, requests: int) -> Outcome | None:
    """What a rule comes to; None where it cannot keep up with the load."""
    if load.rate >= Model(model.fixed_s, model.per_request_s, rule.batch_size).capacity:
        return None
    return run(rule, model, load, requests, warm_up=1000)


def run(rule: Rule, model: Model, load: Load, requests: int, warm_up: int) -> Outcome:
    """Simulates until that many requests are answered, after `warm_up` more that do not count."""
    simulation = Simulation(rule, model, load)
    latencies_s = simulation.latencies_s(requests, warm_up)
    throughput = len(latencies_s) / (simulation.now - simulation.counted_from)
    return Outcome(throughput, latencies_s[len(latencies_s) // 2], latencies_s[int(len(latencies_s) * 0.99)])


def judge(fixed: dict[Rule, Outcome | None], adaptive: Outcome) -> Verdict:
    """Puts the adaptive rule's outcome beside those of the fixed ones."""
    able = {rule: outcome for rule, outcome in fixed.items() if outcome is not None}
    highest = max(outcome.throughput for outcome in able.values())
    near = [rule for rule in able if able[rule].throughput >= LEAST_THROUGHPUT * highest]
    best = min(near, key=lambda rule: able[rule].p99_s)
    return Verdict(best, able[best], adaptive, adaptive.throughput / highest, adaptive.p99_s / able[best].p99_s)
