"""pytest's fixture for handlers, `load_handler`: an entry point makes it known wherever wsgi-ts is installed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # Not otherwise: this module is imported by every run of pytest.
    from wsgi_ts.handler_kit.local_model import LocalModel


@pytest.fixture
def load_handler() -> Iterator[Callable[..., LocalModel]]:
    """Loads handlers as a model worker would, and takes back what that did to the imports of the tests.

    The function that a test gets takes the path of a handler's file, a model's folder or an archive, and the keywords
    `serialized_file`, `model_file`, `config_file`, `gpu_id`, `batch_size`. It returns a `LocalModel`.
    """
    from wsgi_ts.handler_kit.local_model import Source, opened

    path, modules = list(sys.path), set(sys.modules)
    with contextlib.ExitStack() as stack:

        def load(
            path: str | os.PathLike[str],
            *,
            serialized_file: str | None = None,
            model_file: str | None = None,
            config_file: str | None = None,
            gpu_id: int | None = None,
            batch_size: int | None = None,
        ) -> LocalModel:
            source = Source(Path(path), serialized_file, model_file, config_file)
            return stack.enter_context(opened(source, gpu_id, batch_size))

        yield load
    # The next test's handler may be another file of the same name. What packages have imported stays.
    added = [folder for folder in sys.path if folder not in path]
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and any(Path(file).is_relative_to(folder) for folder in added):
            del sys.modules[name]
