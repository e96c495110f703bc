"""`context.metrics` and the older store record what TorchServe's do."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.handlers.metrics.cache import MAX_SAMPLES, MetricsCache
from wsgi_ts.handlers.metrics.errors import (
    GeneralMetricsCacheError,
    MetricsCacheIOError,
    MetricsCacheKeyError,
    MetricsCachePyYamlError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
)
from wsgi_ts.handlers.metrics.metric import CachingMetric, Dimension, MetricTypes, Sample
from wsgi_ts.handlers.metrics.store import Metric, MetricEncoder, MetricsStore, emit_metrics
from wsgi_ts.handlers.torchserve.metrics_cache import LoggedMetricsCache

MODEL = (("ModelName", "m"), ("Level", "Model"))


@pytest.fixture
def cache() -> MetricsCache:
    cache = MetricsCache(model_name="m")
    cache.set_request_ids({0: "id0", 1: "id1"})
    return cache


def test_each_kind_of_metric_has_its_type_and_unit(cache: MetricsCache) -> None:
    cache.add_counter("c", 2)
    cache.add_time("t", 1.5)
    cache.add_time("t2", 1.5, idx=1, unit="s")
    cache.add_size("s", 3)
    cache.add_percent("p", 50)
    cache.add_metric("h", 4, "things", metric_type=MetricTypes.HISTOGRAM)
    cache.add_error("e", 1)
    both = "id0,id1"
    assert cache.take_samples() == [
        Sample("c", "Count", 2, MODEL, "counter", both),
        Sample("t", "Milliseconds", 1.5, MODEL, "gauge", both),
        Sample("t2", "Seconds", 1.5, MODEL, "gauge", "id1"),
        Sample("s", "Megabytes", 3, MODEL, "gauge", both),
        Sample("p", "Percent", 50, MODEL, "gauge", both),
        Sample("h", "things", 4, MODEL, "histogram", both),
        Sample("e", "unit", 1, (("Level", "Error"),), "counter", ""),
    ]
    assert cache.take_samples() == []


def test_without_requests_the_level_is_error() -> None:
    cache = MetricsCache(model_name="m")
    cache.add_counter("c", 1, dimensions=[Dimension("a", "b")])
    assert cache.take_samples() == [Sample("c", "Count", 1, (("a", "b"), ("Level", "Error")), "counter", "")]


def test_request_ids_may_be_one_text(cache: MetricsCache) -> None:
    cache.set_request_ids("a,b")
    assert cache.request_ids == "a,b"
    cache.add_counter("c", 1, idx=1)
    assert cache.take_samples()[0].request_ids == "b"
    cache.set_request_ids("")
    assert cache.request_ids == ""


def test_request_ids_are_what_was_set(cache: MetricsCache) -> None:
    cache.set_request_ids({0: "a", 1: "b"})
    assert cache.request_ids == {0: "a", 1: "b"}
    cache.request_ids = {0: "c", 1: "d"}
    assert cache.request_ids == {0: "c", 1: "d"}
    cache.add_counter("n", 1)
    cache.add_counter("n", 1, idx=1)
    assert [sample.request_ids for sample in cache.take_samples()] == ["c,d", "d"]
    assert cache.for_request("e").request_ids == {0: "e"}


def test_a_metric_of_ones_own(cache: MetricsCache) -> None:
    metric = cache.add_metric_to_cache("mine", "count", ["model", "level"], MetricTypes.COUNTER)
    assert cache.get_metric("mine") is metric
    assert cache.cache_keys() == ["counter:mine"]
    metric.add_or_update(3, ["x", "y"], "id")
    metric.update(4, "id2", [Dimension("model", "z")])
    assert cache.take_samples() == [
        Sample("mine", "Count", 3, (("model", "x"), ("level", "y")), "counter", "id"),
        Sample("mine", "Count", 4, (("model", "z"),), "counter", "id2"),
    ]


def test_a_list_of_dimensions_gets_the_default_ones_for_its_next_use(cache: MetricsCache) -> None:
    dimensions = [Dimension("a", "b")]
    for _ in range(2):
        cache.add_percent("p", 1, dimensions=dimensions)
    cache.get_metric("p", MetricTypes.GAUGE).update(2, "id", dimensions)
    cache.add_percent("q", 1, dimensions=(Dimension("a", "b"),))
    assert [sample.dimensions for sample in cache.take_samples()] == [(("a", "b"), *MODEL)] * 4


def test_values_that_do_not_fit_are_logged_and_not_recorded(
    cache: MetricsCache, caplog: pytest.LogCaptureFixture
) -> None:
    metric = cache.add_metric_to_cache("mine", "count", ["model"])
    metric.add_or_update(1)
    metric.add_or_update(-1, ["x"])
    assert cache.take_samples() == []
    assert caplog.text.count("[METRICS]Failed to update metric with name:mine") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "ms"), "`metric_name` must be a str"),
        (("n", 1), "`unit` must be a str"),
        (("n", "ms", "dimension"), "`dimension_names` should be a list of dimension name strings"),
        (("n", "ms", [1]), "`dimension_names` should be a list of dimension name strings"),
        (("n", "ms", [], "counter"), "`metric_type` must be a MetricTypes enum"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(cache: MetricsCache, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(MetricsCacheTypeError, match=message):
        cache.add_metric_to_cache(*arguments)


def test_wrong_units_and_unknown_metrics_are_refused(cache: MetricsCache) -> None:
    with pytest.raises(MetricsCacheValueError, match=r"timed metric should be one of \['ms', 's'\]"):
        cache.add_time("t", 1, unit="minutes")
    with pytest.raises(MetricsCacheValueError, match=r"size based metric is one of \['MB','kB', 'GB', 'B'\]"):
        cache.add_size("s", 1, unit="TB")
    with pytest.raises(KeyError, match=r"Metric of type 'MetricTypes\.GAUGE' and name 'n' doesn't exist"):
        cache.get_metric("n", MetricTypes.GAUGE)
    with pytest.raises(TypeError, match=r"^`metric_name` must be a str$"):
        cache.get_metric(1)  # type: ignore[arg-type]
    with pytest.raises(MetricsCacheTypeError):
        cache.get_metric("n", "gauge")  # type: ignore[arg-type]
    assert str(GeneralMetricsCacheError("x")) == "Generic error: x"


def test_metrics_of_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.yaml"
    path.write_text(
        "model_metrics:\n  gauge:\n    - {name: HandlerTime, unit: ms, dimensions: [ModelName, Level]}\n  counter:\n"
    )
    cache = MetricsCache(str(path), "m")
    cache.initialize_cache()
    assert cache.get_metric("HandlerTime", MetricTypes.GAUGE).dimension_names == ["ModelName", "Level"]
    cache.set_request_ids("id")
    cache.add_time("HandlerTime", 2)
    assert cache.take_samples() == [Sample("HandlerTime", "Milliseconds", 2, MODEL, "gauge", "id")]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("a: b", MetricsCacheKeyError, "'model_metrics' key not found in yaml file"),
        ("model_metrics:", MetricsCacheValueError, "Missing `model_metrics` specification"),
        ("model_metrics: {speed: []}", MetricsCacheKeyError, "Invalid metric type: .speed. is not a valid"),
        ("model_metrics: {gauge: [{name: a}]}", MetricsCacheKeyError, "Key not found in cache spec: 'unit'"),
        ("a: [", MetricsCachePyYamlError, "Error parsing file"),
        (None, MetricsCacheIOError, "Error reading file"),
    ],
)
def test_broken_yaml_files_are_named(tmp_path: Path, content: str | None, error: type[Exception], message: str) -> None:
    path = tmp_path / "metrics.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        MetricsCache(str(path)).initialize_cache()
    with pytest.raises(MetricsCacheTypeError, match="Config file not initialized"):
        MetricsCache().initialize_cache()


def test_values_that_nobody_takes_do_not_pile_up(cache: MetricsCache) -> None:
    for value in range(MAX_SAMPLES + 5):
        cache.add_counter("c", value)
    samples = cache.take_samples()
    assert len(samples) == MAX_SAMPLES
    assert samples[-1].value == MAX_SAMPLES + 4


def test_a_metric_of_the_file_may_have_no_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "metrics.yaml"
    path.write_text("model_metrics:\n  gauge:\n    - {name: a, unit: ms, dimensions: }\n")
    cache = MetricsCache(str(path), "m")
    cache.initialize_cache()
    cache.get_metric("a", MetricTypes.GAUGE).add_or_update(1)
    assert cache.take_samples() == [Sample("a", "Milliseconds", 1, (), "gauge", "")]


def test_a_metric_without_a_cache_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    CachingMetric("n", "ms", ["a"], MetricTypes.GAUGE).add_or_update(1.5, ["b"], "id")
    assert caplog.messages[0].startswith("[METRICS]n.Milliseconds:1.5|#a:b|#type:GAUGE|#hostname:")
    assert caplog.messages[0].endswith(",id")


def test_a_cache_without_a_server_logs_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "metrics.yaml"
    path.write_text("ts_metrics: {}\nmodel_metrics: {counter: [{name: c, unit: count, dimensions: [a]}]}\n")
    cache = LoggedMetricsCache(str(path))
    assert cache._parse_metrics_section("ts_metrics") == {}
    cache.initialize_cache()
    cache.get_metric("c").add_or_update(2, ["x"])
    cache.add_time("t", 3)
    assert [message.split("|#type")[0] for message in caplog.messages] == [
        "[METRICS]c.Count:2|#a:x",
        "[METRICS]t.Milliseconds:3|#Level:Error",
    ]
    assert cache.take_samples() == []
    path.write_text("a: [")
    with pytest.raises(MetricsCachePyYamlError):
        LoggedMetricsCache(str(path))
    with pytest.raises(OSError, match="No such file"):
        LoggedMetricsCache(str(tmp_path / "none"))
    with pytest.raises(TypeError, match="Error loading None file"):
        LoggedMetricsCache(None)


def test_the_older_store_takes_one_id_for_all_rows() -> None:
    request_id = uuid.UUID(int=7)
    store = MetricsStore(request_id, "m")
    store.add_time("t", 1.5, idx=1)
    assert [metric.request_id for metric in store.store] == [str(request_id)]


def test_the_older_store_keeps_first_values_and_logs_the_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store = MetricsStore({0: "id0", 1: "id1"}, "m")
    store.add_counter("c", 1)
    store.add_counter("c", 2)
    store.add_counter("c", 5, idx=1)
    store.add_time("t", 1.5)
    store.add_time("t", 2.5)
    store.add_size("s", 1, unit="GB")
    store.add_percent("p", 50)
    store.add_error("e", "text")
    assert [(metric.name, metric.value, metric.unit, metric.request_id) for metric in store.store] == [
        ("c", 1, "Count", "id0,id1"),
        ("c", 5, "Count", "id1"),
        ("t", 1.5, "Milliseconds", "id0,id1"),
        ("s", 1, "Gigabytes", "id0,id1"),
        ("p", 50, "Percent", "id0,id1"),
        ("e", "text", "unit", None),
    ]
    with pytest.raises(ValueError, match="list of dimensions"):
        store.add_counter("c", 1, dimensions="x")  # type: ignore[arg-type]
    emit_metrics(store.store[:1])
    emit_metrics(None)
    assert [message.split("|#")[0] for message in caplog.messages] == [
        "[METRICS]c.Count:2",
        "[METRICS]t.Milliseconds:2.5",
        "[METRICS]c.Count:1",
    ]


def test_a_metric_as_json() -> None:
    metric = Metric("n", 1, "ms", [Dimension("a", "b")])
    fields = json.loads(json.dumps(metric, cls=MetricEncoder))
    assert fields["MetricName"] == "n"
    assert fields["Dimensions"] == [{"Name": "a", "Value": "b"}]
    metric.reset()
    assert metric.value == 1
