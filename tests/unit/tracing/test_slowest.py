"""Which requests are worth a record."""

from __future__ import annotations

from wsgi_ts.tracing.slowest import WINDOW_S, Allowance, Slowest

MS = 1_000_000


def test_the_slowest_of_each_model_are_kept() -> None:
    slowest = Slowest(3, 0)
    slowest.look(0.0)
    assert [slowest.is_slow("a", took) for took in (5, 6, 7)] == [True, True, True]
    assert not slowest.is_slow("a", 5)
    assert slowest.is_slow("a", 6)
    assert slowest.is_slow("b", 1)
    # Kept are 6, 6 and 7 now: who comes has to be slower than the least of them.
    assert not slowest.is_slow("a", 6)
    assert slowest.is_slow("a", 8)


def test_each_minute_begins_anew() -> None:
    slowest = Slowest(1, 0)
    slowest.look(10.0)
    assert slowest.is_slow("a", 100)
    slowest.look(10.0 + WINDOW_S - 0.1)
    assert not slowest.is_slow("a", 50)
    slowest.look(10.0 + WINDOW_S)
    assert slowest.is_slow("a", 50)


def test_what_is_above_the_limit_is_kept_in_any_case() -> None:
    slowest = Slowest(1, 20)
    slowest.look(0.0)
    assert slowest.is_slow("a", 500 * MS)
    assert slowest.is_slow("a", 20 * MS)
    assert not slowest.is_slow("a", 19 * MS)


def test_the_limit_may_be_all_there_is() -> None:
    slowest = Slowest(0, 20)
    slowest.look(0.0)
    assert [slowest.is_slow("a", took * MS) for took in (19, 20, 20)] == [False, True, True]


def test_an_allowance_is_used_up_and_comes_back() -> None:
    allowance = Allowance(2.0)
    assert [allowance.take(100.0) for _ in range(3)] == [True, True, False]
    assert [allowance.take(100.5), allowance.take(100.5)] == [True, False]
    assert [allowance.take(200.0) for _ in range(3)] == [True, True, False]
