"""What a tuning tells: the lines of a model-config.yaml, the file for the console, the plot."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from wsgi_ts.tune import report
from wsgi_ts.tune.objective import parse_objective
from wsgi_ts.tune.prediction import Curve
from wsgi_ts.tune.report import Result
from wsgi_ts.tune.search import Point
from wsgi_ts.tune.served_model import Setting

NOW = Setting(1, 0, 1, "adaptive", 100)
BEST = Setting(2, 1, 16, "adaptive", 100)
CONFIG = """\
# how it is served
batchSize: 1   # one by one
minWorkers: 1
handler:
  batchSize: 9
maxWorkers: 1"""


def point(setting: Setting, throughput: float, p99_s: float, *, holds: bool = True) -> Point:
    goodput = throughput if holds else 0.0
    return Point(setting, throughput, throughput, p99_s, goodput, 110.0, holds, [p99_s / 2, p99_s])


@pytest.fixture
def result() -> Result:
    curve = Curve(2, 1, ((1, 0.011), (16, 0.026)), 0.0, ((1.0,), (1.0,)))
    points = [
        point(BEST, 50, 0.02),
        point(BEST, 100, 0.04),
        point(BEST, 120, 0.3, holds=False),
        point(NOW, 20, 0.05),
        point(NOW, 25, math.inf, holds=False),
    ]
    objective = parse_objective(["p99=50ms"])
    return Result("m", "1.0", objective, NOW, NOW, curve, points[3], points[1], points, ["the machine is busy"])


def test_only_what_differs_is_said() -> None:
    assert report.new_keys(NOW, NOW) == {}
    assert report.new_keys(NOW, Setting(2, 0, 8, "none", 50)) == {
        "minWorkers": 2,
        "maxWorkers": 2,
        "batchSize": 8,
        "batchPolicy": "none",
    }
    assert report.new_keys(NOW, Setting(1, 3, 1, "adaptive", 50)) == {"maxBatchDelay": 50, "threadsPerWorker": 3}


def test_the_diff_changes_the_lines_that_are_there_and_adds_the_others() -> None:
    keys = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 16, "batchPolicy": "none"}
    diff = report.config_diff("model-config.yaml", CONFIG, keys)
    assert diff[:2] == ["--- a/model-config.yaml", "+++ b/model-config.yaml"]
    kept = [line[1:] for line in diff[3:] if not line.startswith("-")]
    assert kept[1] == "batchSize: 16   # one by one"
    assert yaml.safe_load("\n".join(kept)) == {**keys, "handler": {"batchSize": 9}}


def test_a_file_that_is_not_there_is_new() -> None:
    diff = report.config_diff("model-config.yaml", "", {"batchSize": 4})
    assert diff == ["--- /dev/null", "+++ b/model-config.yaml", "@@ -0,0 +1 @@", "+batchSize: 4"]


def test_the_file_for_the_console(result: Result, tmp_path: Path) -> None:
    path = report.save(result, tmp_path)
    assert path == tmp_path / "tune" / "m.json"
    found = json.loads(path.read_text())
    assert found["model"] == "m"
    assert found["slo"] == "p99=50ms"
    assert found["curve"] == {"a_ms": pytest.approx(10), "b_ms": pytest.approx(1)}
    rows = found["points"]
    assert rows[1] == {
        "batch_size": 16,
        "workers": 2,
        "threads": 1,
        "delay_ms": 100,
        "policy": "adaptive",
        "rate": 100,
        "throughput": 100,
        "p99_ms": 40,
        "goodput": 100,
        "predicted": 110,
        "pareto": True,
        "chosen": True,
    }
    assert [row["pareto"] for row in rows] == [True, True, True, False, False]
    assert rows[4]["p99_ms"] is None
    assert list((tmp_path / "tune").iterdir()) == [path]


def test_what_people_read(result: Result) -> None:
    told = "\n".join(report.lines(result))
    assert "A batch of n takes 10.00 + 1.000 n ms (2 workers busy)." in told
    assert "Now:    1 worker, batches of 1, adaptive 100 ms: 20 requests a second within the limits." in told
    assert "predicted 110, off by 10%; p99 40.0 ms" in told
    drawn = report.plot(result)
    assert [sum(line.count(mark) for line in drawn) for mark in "@*."] == [1, 2, 1]
    assert len(report.table(result)) == 6


def test_the_picture(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.write_png(result, tmp_path / "a.png") == f"Picture: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_goal_that_cannot_be_met_is_told_with_the_nearest(result: Result) -> None:
    result.objective = parse_objective(["p99=5ms"])
    told = report.nearest(result, [result.curve])
    assert "p99=5ms cannot be met" in told
    assert "11.0 ms" in told
