"""The helpers of `ts.utils.util` and their kin."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsgi_ts.handlers.metrics.cache import MetricsCache
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.toolkit.phase_times import measure_phases, phase, timed
from wsgi_ts.handlers.toolkit.utils import deprecated, import_class, load_label_mapping, map_class_to_label, timeit


@pytest.mark.parametrize(
    ("content", "mapping"),
    [
        ({"0": "cat", "1": "dog"}, {"0": "cat", "1": "dog"}),
        ({"0": ["n01", "cat"]}, {"0": "cat"}),
        ({"object_type_names": ["cat", "dog"]}, {"0": "cat", "1": "dog"}),
    ],
)
def test_label_mappings_of_every_form(tmp_path: Path, content: Any, mapping: dict[str, str]) -> None:
    path = tmp_path / "index_to_name.json"
    path.write_text(json.dumps(content))
    assert load_label_mapping(str(path)) == mapping


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1], 'should be in "class": "label" format'),
        ({"0": 1}, "must be either str or List"),
        ({"0": []}, "must be either str or List"),
    ],
)
def test_other_label_mappings_are_refused(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "index_to_name.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        load_label_mapping(str(path))


def test_a_missing_label_mapping_is_only_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_label_mapping(str(tmp_path / "none.json")) is None
    assert "none.json is missing. Inference output will not include class name." in caplog.text


def test_classes_become_labels() -> None:
    probs = [[0.9, 0.1], [0.7, 0.3]]
    assert map_class_to_label(probs) == [{"0": 0.9, "1": 0.1}, {"0": 0.7, "1": 0.3}]
    mapping = {"0": "cat", "5": "dog"}
    labels = map_class_to_label(probs, mapping, [[5, 0], [0, 5]])
    assert labels == [{"dog": 0.9, "cat": 0.1}, {"cat": 0.7, "dog": 0.3}]
    with pytest.raises(TypeError, match="Convert classes to list"):
        map_class_to_label((0.5,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Mapping must be a dict"):
        map_class_to_label(probs, ["cat"])  # type: ignore[arg-type]


def test_prediction_exception_shows_message_and_code() -> None:
    assert str(PredictionException("text", 513)) == "text : 513"
    assert PredictionException("text").error_code == 500


def test_import_class_by_dotted_name() -> None:
    assert import_class("json.JSONDecoder") is json.JSONDecoder
    assert import_class("JSONDecoder", "json") is json.JSONDecoder
    assert import_class("decoder.JSONDecoder", "json") is json.JSONDecoder
    with pytest.raises(ImportError, match="names no module"):
        import_class("JSONDecoder")
    with pytest.raises(ImportError, match='no class "Nothing"'):
        import_class("json.Nothing")


def test_deprecated_functions_warn_and_work() -> None:
    @deprecated("2.0", "new")
    def old(value: int) -> int:
        return value + 1

    with pytest.warns(PendingDeprecationWarning, match=r"^old is deprecated in 2.0 and moved to new$"):
        assert old(1) == 2


def test_a_function_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    @timeit
    def double(value: int) -> int:
        return 2 * value

    assert double(2) == 4
    assert re.match(r"func: 'double' took a total of 0.\d{4} sec to run and 0.\d{4} sec of", capsys.readouterr().out)


@pytest.mark.parametrize("profile", [True, False])
def test_timed_methods_are_measured_if_the_yaml_says_so(profile: bool) -> None:
    class Handler:
        context = SimpleNamespace(
            model_yaml_config={"handler": {"profile": profile}}, metrics=MetricsCache(model_name="m")
        )

        @timed
        def inference(self, value: int) -> int:
            return value + 1

    assert Handler().inference(1) == 2
    samples = Handler.context.metrics.take_samples()
    assert [(sample.name, sample.unit) for sample in samples] == (
        [("ts_handler_inference", "Milliseconds")] if profile else []
    )


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_time_of_a_method_holds_what_it_has_the_gpu_do(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    steps: list[str] = []

    class Handler:
        context = SimpleNamespace(
            model_yaml_config={"handler": {"profile": True}}, metrics=MetricsCache(model_name="m")
        )

        @timed
        def inference(self) -> None:
            steps.append("called")

    def record(*args: Any, **kwargs: Any) -> None:
        steps.append("recorded")

    monkeypatch.setattr(Handler.context.metrics, "add_time", record)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: steps.append("waited"))
    Handler().inference()
    assert steps == (["waited", "called", "waited", "recorded"] if has_gpu else ["called", "recorded"])


def test_a_phase_is_what_it_was_until_the_yaml_says_profile() -> None:
    def inference(self: Any, value: int) -> int:
        return value + 1

    class Bundled:
        context = SimpleNamespace(model_yaml_config={}, metrics=MetricsCache(model_name="m"))

    class Derived(Bundled):
        def inference(self, value: int) -> int:
            inherited: int = super().inference(value)  # type: ignore[misc]
            return 10 * inherited

    plain = phase(inference)
    Bundled.inference = plain  # type: ignore[attr-defined]
    for config in ({}, {"handler": {"profile": False}}, {"handler": "no section"}):
        Bundled.context.model_yaml_config = config
        measure_phases(Derived, Bundled.context)
        assert Bundled.inference is plain  # type: ignore[attr-defined]
    Bundled.context.model_yaml_config = {"handler": {"profile": True}}
    for _ in range(2):
        measure_phases(Derived, Bundled.context)
    assert Derived().inference(1) == 20
    assert [sample.name for sample in Bundled.context.metrics.take_samples()] == ["ts_handler_inference"]
