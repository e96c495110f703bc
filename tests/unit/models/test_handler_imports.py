"""Which handlers need not wait for torch: told from their source, and only where that is plain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wsgi_ts.models.handler_imports import OURS_AT_HAND, Needs, needs_of


@pytest.mark.parametrize(
    "source",
    [
        "def handle(data, context): return data",
        "import json, os.path\nfrom collections.abc import Sequence",
        "import numpy as np\nfrom numpy.random import default_rng",
        "from ts.context import Context\nfrom ts.protocol.otf_message_handler import x\nimport ts.metrics.dimension",
        "import helper",
        "from __future__ import annotations",
    ],
)
def test_a_handler_that_imports_only_what_all_workers_have_does_not_wait(tmp_path: Path, source: str) -> None:
    (tmp_path / "service.py").write_text(source)
    (tmp_path / "helper.py").write_text("import math, service")
    for handler in ("service.py", "service", "service.py:handle", "service:handle"):
        assert not needs_of(handler, tmp_path).preloaded


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "def handle(data, context):\n    import torch.nn as nn",
        "from ts.torch_handler.base_handler import BaseHandler",
        "from ts import context",
        "import PIL",
        "import helper, other",
        "from . import helper",
        "import package",
        "import importlib",
        "__import__('tor' + 'ch')",
        "exec('import torch')",
        "import pickle",
        "this is no Python",
        "x = 0\n" * 300_000,
    ],
)
def test_all_others_wait(tmp_path: Path, source: str) -> None:
    (tmp_path / "service.py").write_text(source)
    (tmp_path / "helper.py").write_text("import math")
    (tmp_path / "other.py").write_text("import torch")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    assert needs_of("service.py", tmp_path).preloaded


@pytest.mark.parametrize("handler", ["", "image_classifier", "image_classifier:x", "missing.py", "folder/"])
def test_a_handler_without_a_file_of_its_own_waits(tmp_path: Path, handler: str) -> None:
    (tmp_path / "folder").mkdir()
    assert needs_of(handler, tmp_path).preloaded


def test_a_handler_in_a_folder_finds_the_modules_beside_it_and_the_models(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "service.py").write_text("import beside, above")
    (tmp_path / "code" / "beside.py").write_text("import math")
    (tmp_path / "above.py").write_text("import math")
    assert not needs_of("code/service.py", tmp_path).preloaded
    (tmp_path / "above.py").write_text("import torch")
    assert needs_of("code/service.py", tmp_path).preloaded


def test_a_module_of_the_models_own_counts_before_one_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("import json")
    (tmp_path / "json.py").write_text("import torch")
    assert needs_of("service.py", tmp_path).preloaded


def test_numpy_is_needed_where_a_file_of_the_handler_imports_it(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("import helper")
    (tmp_path / "helper.py").write_text("import math")
    assert needs_of("service.py", tmp_path) == Needs(preloaded=False, numpy=False)
    (tmp_path / "helper.py").write_text("def late():\n    from numpy.linalg import norm")
    assert needs_of("service.py", tmp_path) == Needs(preloaded=False, numpy=True)
    (tmp_path / "service.py").write_text("import PIL")
    assert needs_of("service.py", tmp_path) == Needs(preloaded=True, numpy=True)


def test_what_is_ours_and_at_hand_imports_no_torch() -> None:
    """All of it, with every module in it."""
    code = f"""
import importlib, pkgutil, sys
for name in {OURS_AT_HAND!r}:
    module = importlib.import_module(name)
    for each in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(each.name)
print("torch" in sys.modules)
"""
    shim = subprocess.run([sys.executable, "-m", "wsgi_ts.ts_path"], capture_output=True, text=True, check=True)
    code = f"import sys; sys.path.append({shim.stdout.strip()!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")
