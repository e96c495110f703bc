"""Model archives made on the spot, in a few milliseconds: a handler's source, a manifest, whatever files."""

from __future__ import annotations

import json
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HANDLER_FILE = "handler.py"

#: Answers every request with its own body, whatever its content type.
ECHO = """
def handle(data, context):
    if data is None:
        return None
    return [row.get("body", b"") for row in data]
"""


def archive(
    store: Path,
    name: str,
    handler_source: str = ECHO,
    *,
    version: str = "1.0",
    files: Mapping[str, bytes | str] | None = None,
    config_yaml: str | None = None,
    manifest_overrides: Mapping[str, Any] | None = None,
    file_name: str | None = None,
) -> Path:
    """Makes a `.mar` in `store`.

    Args:
        store: the model store.
        name: the model's name, and the file's.
        handler_source: Python source of the handler: a module with a function `handle`, or one class.
        version: the model's version.
        files: further files of the archive.
        config_yaml: text of its model-config.yaml.
        manifest_overrides: entries of the manifest's `model` object to set, or with None to remove.
        file_name: the archive's file name; `{name}.mar` by default.
    """
    source = textwrap.dedent(handler_source)
    entry = f"{HANDLER_FILE}:handle" if "def handle(data" in source else HANDLER_FILE
    model: dict[str, Any] = {"modelName": name, "handler": entry, "modelVersion": version}
    contents: dict[str, bytes | str] = {HANDLER_FILE: source, **(files or {})}
    if config_yaml is not None:
        model["configFile"] = "model-config.yaml"
        contents["model-config.yaml"] = textwrap.dedent(config_yaml)
    model.update(manifest_overrides or {})
    model = {key: value for key, value in model.items() if value is not None}
    manifest = {
        "createdOn": "01/01/2026 00:00:00",
        "runtime": "python",
        "model": model,
        "archiverVersion": "0.12.0",
    }
    path = store / (file_name or f"{name}.mar")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as bundle:
        bundle.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest, indent=2))
        for file, content in contents.items():
            bundle.writestr(file, content)
    return path
