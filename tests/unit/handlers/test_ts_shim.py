"""Every import path of TorchServe that is offered works, in a process of its own as in a model worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from wsgi_ts.handlers.service import shim_path

CHECK = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for symbol in getattr(module, "__all__", ()):
        getattr(module, symbol)
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.torch_handler.base_handler import BaseHandler
from ts.torch_handler.image_classifier import ImageClassifier
from ts.utils.util import PredictionException
import ts.service, ts.version, wsgi_ts.handlers.context
assert Context is wsgi_ts.handlers.context.Context
assert issubclass(ImageClassifier, BaseHandler)
assert ts.service.PredictionException is PredictionException
assert ts.version.__version__ == "0.12.0"
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_shim_is_not_importable_without_its_folder_on_the_path() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ts.context"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
