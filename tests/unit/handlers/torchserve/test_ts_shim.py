"""Every import path of TorchServe that is offered works, in a process of its own as in a model worker."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wsgi_ts.ts_path import shim_path

CHECK = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.torch_handler.base_handler import BaseHandler
from ts.torch_handler.image_classifier import ImageClassifier
from ts.utils.util import PredictionException
from ts.arg_parser import ArgParser
assert ArgParser.extract_args(["--start", "--models", "a=b.mar"]).models == ["a=b.mar"]
assert ArgParser.model_service_worker_args().parse_args(["--sock-type", "tcp", "--port", "1"]).port == "1"
import ts.service, ts.version, wsgi_ts.handlers.serving.context
assert Context is wsgi_ts.handlers.serving.context.Context
assert issubclass(ImageClassifier, BaseHandler)
assert ts.service.PredictionException is PredictionException
assert ts.version.__version__ == ts.__version__ == "0.12.0"
import ts.model_loader, ts.model_service_worker
from unittest import mock
with mock.patch("ts.model_service_worker.ModelLoaderFactory") as factory, mock.patch("ts.service.Service") as service:
    assert ts.model_service_worker.TorchModelServiceWorker.load_model.__globals__["ModelLoaderFactory"] is factory
    assert ts.service.Service is service
from ts.metrics.unit import Units
assert Units().units["ms"] == "Milliseconds"
"""


def test_all_import_paths_work() -> None:
    root = Path(shim_path())
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(root.rglob("*.py"))
    ]
    assert "ts.torch_handler.request_envelope.json" in names
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(root), *sys.path]))
    command = [sys.executable, "-W", "error", "-c", CHECK, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("torch_handler.text_handler", "TextHandler"),
        ("torch_handler.text_classifier", "TextClassifier"),
        ("torch_handler.dali_handler", "DALIHandler"),
        ("torch_handler.dali_image_classifier", "DALIImageClassifier"),
        ("torch_handler.vllm_handler", "VLLMHandler"),
        ("torch_handler.trt_llm_handler", "TRTLLMHandler"),
        ("llm_launcher", "main"),
        ("torch_handler.densenet_handler", "DenseNetHandler handle"),
        ("torch_handler.contractions", "CONTRACTION_MAP"),
        ("torch_handler.unit_tests.test_utils.mock_context", "MockContext"),
        ("torch_handler.unit_tests.test_utils.model_dir", "copy_files download_model"),
        ("handler_utils.utils", "send_intermediate_predict_response import_class create_predict_response"),
        ("handler_utils.timer", "timed"),
        ("handler_utils.micro_batching", "MicroBatching HANDLER_METHODS"),
        ("handler_utils.hf_batch_streamer", "TextIteratorStreamerBatch"),
        ("handler_utils.preprocess.dali", "get_dali_pipeline"),
        ("handler_utils.text_utils", "get_tokenizer ngrams_iterator"),
        (
            "protocol.otf_message_handler",
            "send_intermediate_predict_response create_predict_response create_load_model_response retrieve_msg "
            "encode_response_headers",
        ),
        ("utils.hf_utils", "download_model"),
        ("model_loader", "ModelLoader TsModelLoader ModelLoaderFactory"),
        ("model_service_worker", "TorchModelServiceWorker"),
        ("model_server", "start"),
        ("service", "Service emit_metrics PREDICTION_METRIC PredictionException"),
        ("utils.timeit_decorator", "timeit"),
        ("launcher", "start stop register_model register_model_with_params"),
    ],
)
def test_the_names_of_a_module(module: str, names: str) -> None:
    source = Path(shim_path()) / "ts" / (module.replace(".", "/") + ".py")
    imports = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    assert set(names.split()) <= {alias.asname or alias.name for node in imports for alias in node.names}


def test_the_folder_can_be_asked_for() -> None:
    command = [sys.executable, "-m", "wsgi_ts.ts_path"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert Path(done.stdout.strip()).samefile(shim_path())


def test_scripts_import_it_without_more_ado(tmp_path: Path) -> None:
    """The installation has put the folder on `sys.path`: no script of a user knows of it."""
    code = "import ts.launcher, ts.torch_handler.base_handler; print(ts.__file__)"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=300)
    assert Path(done.stdout.strip()).parts[-3:] == ("ts_shim", "ts", "__init__.py")
