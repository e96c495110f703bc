"""The autoscaler that the simulator has: the rule that Kubernetes documents."""

from __future__ import annotations

import pytest
from lifecycle.autoscaler import Autoscaler


@pytest.mark.parametrize(
    ("current", "value", "wanted"),
    [(1, 2.0, 3), (2, 0.7, 2), (2, 0.76, 2), (2, 0.8, 3), (4, 100.0, 6), (3, 0.1, 1), (3, 0.0, 1)],
)
def test_as_many_as_the_target_takes(current: int, value: float, wanted: int) -> None:
    rule = Autoscaler({"load": 0.7}, least=1, most=6, window_s=0)
    assert rule.desired(0, current, {"load": [value] * current}) == wanted


def test_the_metric_that_wants_most_counts_and_one_without_values_does_not() -> None:
    rule = Autoscaler({"load": 1, "wait": 0.5}, least=1, most=9, window_s=0)
    assert rule.desired(0, 2, {"load": [0.1, 0.1], "wait": [1.0, 1.0]}) == 4
    assert rule.desired(1, 4, {"load": [2.0] * 4, "wait": []}) == 8
    assert rule.desired(2, 8, {"load": [], "wait": []}) == 8


def test_down_only_to_what_was_wanted_within_the_window() -> None:
    rule = Autoscaler({"load": 1}, least=1, most=9, window_s=10)
    assert rule.desired(0, 1, {"load": [4.0]}) == 4
    assert rule.desired(3, 4, {"load": [0.25] * 4}) == 4
    assert rule.desired(6, 4, {"load": [0.5] * 4}) == 4
    assert rule.desired(12, 4, {"load": [0.25] * 4}) == 2
    assert rule.desired(17, 2, {"load": [0.5] * 2}) == 1
