"""The line through what was measured, and what is predicted from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wsgi_ts.tune.objective import parse_objective
from wsgi_ts.tune.prediction import Curve, best_rate, latencies_s, noise_of
from wsgi_ts.tune.search import candidates
from wsgi_ts.tune.served_model import Setting

EXACT = (1.0,)


def curve(workers: int = 1, fixed_s: float = 0.010, per_request_s: float = 0.001, largest: int = 32) -> Curve:
    sizes = [1 << power for power in range(largest.bit_length())]
    measured = tuple((size, fixed_s + per_request_s * size) for size in sizes)
    return Curve(workers, 1, measured, 0.0, (EXACT,) * len(measured))


def setting(batch_size: int, workers: int = 1, policy: str = "adaptive", delay_ms: int = 100) -> Setting:
    return Setting(workers, 1, batch_size, policy, delay_ms)


def test_the_line_is_found() -> None:
    assert curve().line == (pytest.approx(0.010), pytest.approx(0.001))
    single = Curve(1, 1, ((1, 0.004),), 0.0, (EXACT,))
    assert single.line == (0.0, 0.004)


def test_what_is_no_line_is_predicted_by_what_was_measured() -> None:
    steps = Curve(1, 1, ((1, 0.010), (2, 0.010), (4, 0.010), (8, 0.040)), 0.0, (EXACT,) * 4)
    assert [steps.model(8).cost_s(n) for n in (1, 3, 4, 6, 8)] == pytest.approx([0.01, 0.01, 0.01, 0.025, 0.04])
    assert steps.capacity(4) == pytest.approx(400)


def test_noise_is_what_batches_are_off_by() -> None:
    noise = noise_of(sorted([0.012] * 90 + [0.022] * 10), 0.002)
    assert len(noise) == 100
    assert sum(noise) / len(noise) == pytest.approx(1.0)
    assert noise[-1] == pytest.approx(2 * noise[0])


def test_one_at_a_time_the_rate_is_below_what_a_worker_can_do_and_more_with_larger_batches() -> None:
    objective = parse_objective(["p99=60ms"])
    one, four, sixteen = (best_rate(curve(), setting(size), objective) for size in (1, 4, 16))
    assert 0.3 * 91 < one < 91
    assert one < four < sixteen < 16 / 0.026


def test_two_workers_serve_about_twice_as_much() -> None:
    objective = parse_objective(["p99=60ms"])
    one = best_rate(curve(), setting(16), objective)
    two = best_rate(curve(workers=2), setting(16, workers=2), objective)
    assert 1.7 * one < two < 2.4 * one


def test_the_rate_is_the_highest_that_keeps_the_limits() -> None:
    objective = parse_objective(["p99=60ms"])
    rate = best_rate(curve(), setting(8), objective)
    assert objective.holds(latencies_s(curve(), setting(8), rate))
    assert not objective.holds(latencies_s(curve(), setting(8), 1.1 * rate))


def test_what_cannot_be_kept_has_no_rate() -> None:
    assert best_rate(curve(), setting(8), parse_objective(["p99=10ms"])) == 0.0
    slow_way = replace(curve(), overhead_s=0.1)
    assert best_rate(slow_way, setting(8), parse_objective(["p99=60ms"])) == 0.0


def test_the_best_candidate_has_more_workers_and_batches_that_the_limits_have_room_for() -> None:
    objective = parse_objective(["p99=60ms"])
    told: list[str] = []
    found = candidates([curve(), curve(workers=2)], setting(1), objective, told.append, float("inf"))
    assert found[0].setting.workers == 2
    assert found[0].setting.batch_size > 4
    assert found[0].setting.policy == "adaptive"
    assert told
    assert not candidates([curve()], setting(1), parse_objective(["p99=10ms"]), told.append, float("inf"))
