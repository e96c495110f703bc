"""For the tests of handlers, without a server: a stand-in for the context, and a model folder's files."""

from __future__ import annotations

import os
import shutil
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.handlers.metrics.store import MetricsStore
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.toolkit.utils import get_yaml_config


class MockContext(Context):
    """A context for a handler's own tests, with the arguments of TorchServe's test double of that name.

    As in a model worker, modules of the model's folder can be imported from then on.

    Args:
        model_pt_file: the manifest's serialized file, None for none.
        model_file: the manifest's model file, None for none.
        model_yaml_config_file: a YAML file in `model_dir`, or a path to one.

    Attributes:
        explain: what rows behind the first say of any header, as TorchServe's double has it. The first row has the
            headers of its processor, so a handler explains where `request_processor[0]` has `explain: True`.
    """

    def __init__(
        self,
        model_pt_file: str | None = "model.pt",
        model_dir: str = "",
        model_file: str | None = "model.py",
        gpu_id: int | str | None = "0",
        model_name: str = "mnist",
        model_yaml_config_file: str | None = None,
    ) -> None:
        model: dict[str, Any] = {"modelName": model_name}
        if model_pt_file:
            model["serializedFile"] = model_pt_file
        if model_file:
            model["modelFile"] = model_file
        config: dict[str, Any] = {}
        if model_yaml_config_file:
            config = get_yaml_config(str(Path(model_dir) / model_yaml_config_file))
        if model_dir:
            folder = str(Path(model_dir).absolute())
            sys.path[:] = [folder, *(each for each in sys.path if each != folder)]
        super().__init__(
            model_name=model_name,
            model_dir=model_dir,
            manifest={"model": model},
            batch_size=1,
            gpu=None if gpu_id in (None, "") else int(gpu_id),
            metrics=MetricsStore({0: ""}, model_name),
            model_yaml_config=config,
        )
        self.explain = False

    def get_request_header(self, idx: int, key: str) -> Any:
        """The header of the first row, False where it has none; of any other row, whether `explain` is set."""
        if idx:
            return bool(key and self.explain)
        value = super().get_request_header(idx, key)
        return False if value is None else value


def download_model(model_url: str, model_dir: str | os.PathLike[str]) -> None:
    """Downloads a model file to `model.pt` in a folder, unless the folder has one.

    Raises:
        OSError: it cannot be downloaded; nothing is left in the folder then.
    """
    target = Path(model_dir) / "model.pt"
    if target.exists():
        return
    part = target.with_name("model.pt.part")
    try:
        with urllib.request.urlopen(model_url) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def copy_files(src_dir: str | os.PathLike[str], dst_dir: str | os.PathLike[str], files: Mapping[str, str]) -> None:
    """Copies files, each under the name that `files` maps its name to."""
    for source, target in files.items():
        shutil.copyfile(Path(src_dir) / source, Path(dst_dir) / target)
