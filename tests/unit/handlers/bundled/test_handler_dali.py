"""The handlers with a DALI pipeline: without DALI the error names it; with it, whole batches go through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from wsgi_ts.handlers.bundled.dali import DALIImageClassifier, get_dali_pipeline
from wsgi_ts.handlers.testing import MockContext


@pytest.fixture
def context(tmp_path: Path) -> MockContext:
    (tmp_path / "p.dali").touch()
    (tmp_path / "model-config.yaml").write_text("dali: {num_threads: 2, device_id: 3}")
    return MockContext(model_dir=str(tmp_path), gpu_id=None, model_yaml_config_file="model-config.yaml")


def test_without_dali_the_error_names_it(context: MockContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali.pipeline", None)
    with pytest.raises(ImportError, match=r"The model mnist needs the package nvidia-dali.*install it"):
        get_dali_pipeline(context)


def test_the_yaml_describes_the_pipeline(context: MockContext, dali: None, tmp_path: Path) -> None:
    assert get_dali_pipeline(context).options == {
        "filename": str(tmp_path / "p.dali"),
        "batch_size": 1,
        "num_threads": 2,
        "device_id": 3,
        "seed": -1,
        "prefetch_queue_depth": 1,
    }
    (tmp_path / "q.dali").touch()
    with pytest.raises(FileNotFoundError, match=r"2 \*\.dali files"):
        get_dali_pipeline(context)
    context.model_yaml_config["dali"]["pipeline_file"] = "q.dali"
    assert get_dali_pipeline(context).options["filename"] == str(tmp_path / "q.dali")
    context.model_yaml_config["dali"]["pipeline_file"] = "r.dali"
    with pytest.raises(FileNotFoundError, match=r"no r\.dali"):
        get_dali_pipeline(context)
    context.model_yaml_config.clear()
    with pytest.raises(ValueError, match="no section dali"):
        get_dali_pipeline(context)


def test_a_batch_goes_through_the_pipeline(context: MockContext, dali: None) -> None:
    handler = DALIImageClassifier()
    handler.device = torch.device("cpu")
    handler.model = torch.nn.Identity()
    handler.pipeline = get_dali_pipeline(context)
    answers = handler.handle([{"data": b"\x09\x09"}, {"body": "AAA="}], context)
    assert [next(iter(answer)) for answer in answers] == ["0", "0"]
    assert [answer["0"] for answer in answers] == [pytest.approx(0.99988, abs=1e-4), 0.5]
