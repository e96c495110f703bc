"""A model folder to write handlers into, and a clean import state around each test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.handlers.serving.service import Service
from wsgi_ts.messages import ModelSpec

LoadModel = Callable[..., Service]


@pytest.fixture
def imports(tmp_path: Path) -> Iterator[None]:
    """Takes back what a loaded model did to sys.path and sys.modules."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if name.partition(".")[0] == "ts" or file.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def load_model(tmp_path: Path, imports: None) -> Iterator[LoadModel]:
    """Writes files into a model folder and loads the handler from it."""

    def load(handler: str, files: dict[str, str], *, chunks: Any = None, sink: Any = None, **spec: Any) -> Service:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        spec = {"model_dir": str(tmp_path), "handler": handler, "manifest": {"model": {}}, **spec}
        service = Service.load(ModelSpec(index=0, name="m", version="1.0", **spec), None, chunks, sink)
        services.append(service)
        return service

    services: list[Service] = []
    yield load
    for service in services:
        service.close()
