"""The waits before a dead process is started again."""

from __future__ import annotations

from wsgi_ts.restart_backoff import RestartBackoff


def test_the_first_death_restarts_at_once() -> None:
    assert RestartBackoff().on_death(100.0) == 0.0
    assert RestartBackoff().on_death(100.0, came_up=True) == 0.0


def test_the_first_four_deaths_cost_a_second_at_most() -> None:
    backoff = RestartBackoff()
    assert [backoff.on_death(100.0 + nth) for nth in range(4)] == [0.0, 0.1, 0.3, 1.0]
    assert not backoff.is_looping


def test_a_loop_slows_down_and_never_gives_up() -> None:
    backoff = RestartBackoff()
    delays = [backoff.on_death(100.0 + nth) for nth in range(30)]
    assert backoff.is_looping
    assert delays[4:8] == [5.0, 10.0, 20.0, 30.0]
    assert set(delays[8:]) == {30.0}


def test_lives_that_came_up_are_no_loop() -> None:
    """Whoever kills a healthy process again and again meets its next life within a second each time."""
    backoff = RestartBackoff()
    delays = [backoff.on_death(100.0 + nth, came_up=True) for nth in range(30)]
    assert delays[:4] == [0.0, 0.1, 0.3, 1.0]
    assert set(delays[4:]) == {1.0}
    assert not backoff.is_looping


def test_a_life_that_came_up_ends_a_loop() -> None:
    backoff = RestartBackoff()
    for nth in range(10):
        backoff.on_death(100.0 + nth)
    assert backoff.on_death(110.0, came_up=True) == 1.0
    assert backoff.on_death(111.0) == 1.0
    assert not backoff.is_looping


def test_old_deaths_are_forgotten() -> None:
    backoff = RestartBackoff()
    for nth in range(10):
        backoff.on_death(float(nth))
    assert backoff.on_death(1000.0) == 0.0
    assert not backoff.is_looping
