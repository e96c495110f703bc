"""TorchServe's classes `TsModelLoader` and `Service` without a server, as tools and tests use them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from wsgi_ts.handlers.metrics.cache import MetricsCache
from wsgi_ts.handlers.serving.envelopes import JSONEnvelope
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.torchserve import service as service_module
from wsgi_ts.handlers.torchserve.model_loader import ModelLoaderFactory
from wsgi_ts.handlers.torchserve.service import Service

HANDLERS = """
class Handler:
    async def initialize(self, context):
        context.seen = context.model_yaml_config
        if context.system_properties["gpu_id"] == 7:
            raise RuntimeError("no such GPU")

    async def handle(self, data, context):
        return [{"row": row} for row in data]
"""
BATCH = [
    {
        "requestId": b"id",
        "parameters": [{"name": "xyz", "value": "abc", "contentType": "text/csv"}],
        "headers": [{"name": b"x", "value": b"y"}],
    }
]


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", sys.path[:])
    for module in ("service_class", "service_function"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "MAR-INF").mkdir()
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text('{"model": {"configFile": "model-config.yaml"}}')
    (tmp_path / "model-config.yaml").write_text("key: 1\n")
    (tmp_path / "service_class.py").write_text(HANDLERS)
    (tmp_path / "service_function.py").write_text("def infer(data, context):\n    return data and [1]\n")
    return tmp_path


def load(model_dir: Path, handler: str, *others: Any, **named: Any) -> Service:
    return ModelLoaderFactory.get_model_loader().load("m", str(model_dir), handler, *others, **named)


def test_a_class_is_loaded_and_answers_in_frames(model_dir: Path) -> None:
    cache = MetricsCache(None, "m")
    service = load(model_dir, "service_class.py", None, 1, metrics_cache=cache)
    assert service._entry_point is not None
    assert service._entry_point.__name__ == "handle"
    assert service.context.seen == {"key": 1}
    frame = service.predict(BATCH)
    assert b"Prediction success" in frame
    assert b'"xyz": "abc"' in frame
    assert [sample.name for sample in cache.take_samples()] == ["PredictionTime"]
    service.close()


def test_functions_and_envelopes_are_entry_points(model_dir: Path) -> None:
    function = load(model_dir, "service_function:infer")._entry_point
    assert function is not None
    assert function.__name__ == "infer"
    enveloped = load(model_dir, "service_function:infer", envelope="json")._entry_point
    assert isinstance(getattr(enveloped, "__self__", None), JSONEnvelope)
    with pytest.raises(ValueError, match="Expected only one class"):
        load(model_dir, "service_function:wrong")
    with pytest.raises(LoadError):
        load(model_dir, "service_class", 7)


def test_tests_may_put_a_service_together() -> None:
    service = object.__new__(Service)
    service.__dict__.update(Service("m", "", "manifest", lambda data, context: ["x"], None, 1).__dict__)
    with mock.patch.object(service_module, "create_predict_response") as create:
        service.predict(BATCH)
    create.assert_called_once_with([b"x"], {0: "id"}, "Prediction success", 200, context=service.context)
    headers, rows, ids = service.retrieve_data_for_inference(BATCH)
    assert headers[0].get_request_property("xyz") == {"content-type": "text/csv"}
    assert headers[0].get_request_property("x") == "y"
    assert (rows, ids) == ([{"xyz": "abc"}], {0: "id"})
    with pytest.raises(ValueError, match="Received invalid inputs"):
        service.predict(None)  # type: ignore[arg-type]
