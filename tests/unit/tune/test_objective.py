"""What `--slo` takes, and what latencies come to by it."""

from __future__ import annotations

import math

import pytest

from wsgi_ts.tune.objective import parse_objective


def test_limits_behind_commas_and_in_several_flags() -> None:
    objective = parse_objective(["p99=50ms, p50<=10ms", "avg=0.5s", "p99.9=750us"])
    assert [(term.percent, term.limit_s) for term in objective.terms] == [
        (99, 0.05),
        (50, 0.01),
        (0, 0.5),
        (99.9, pytest.approx(750e-6)),
    ]
    assert objective.longest_s == 0.5
    assert objective.text == "p99=50ms,p50<=10ms,avg=0.5s,p99.9=750us"


@pytest.mark.parametrize(
    "text", ["", "p99", "p99=50", "p99=50m", "p100=5ms", "p0=5ms", "99=5ms", "p99=0ms", "p99=1ms,p99=2ms", "p99=5ms,,"]
)
def test_what_makes_no_sense_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="--slo"):
        parse_objective([text])


def test_latencies_keep_limits_or_say_by_how_much_not() -> None:
    ordered = sorted([0.010] * 95 + [0.060] * 5)
    assert parse_objective(["p90=20ms,max=60ms,avg=20ms"]).holds(ordered)
    objective = parse_objective(["p99=50ms,p50=20ms"])
    assert not objective.holds(ordered)
    assert [term.text for term in objective.broken(ordered)] == ["p99=50ms"]
    assert objective.share(ordered) == pytest.approx(0.95 / 0.99)
    assert parse_objective(["p50=20ms"]).share(ordered) == 1.0


def test_a_failure_is_never_in_time() -> None:
    ordered = [0.001] * 90 + [math.inf] * 10
    for text in ("p99=50ms", "avg=50ms", "max=50ms"):
        assert not parse_objective([text]).holds(ordered)
        assert parse_objective([text]).share(ordered) < 1.0
    assert not parse_objective(["p99=50ms"]).holds([])
