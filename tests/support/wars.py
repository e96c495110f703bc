"""Workflow archives made on the spot: a specification, a handler's source, whatever files."""

from __future__ import annotations

import json
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: A model that answers with what it got, and its name behind it.
NAMED = """
def handle(data, context):
    if data is None:
        return None
    return [bytes(row.get("body") or row.get("data") or b"") + b" " + context.model_name.encode() for row in data]
"""
#: Functions at both ends of a chain.
FUNCTIONS = """
def before(data, context):
    if data is None:
        return None
    row = data[0]
    value = row.get("data") or row.get("body") or b""
    return [bytes(value if not isinstance(value, str) else value.encode()) + b" before"]

def after(data, context):
    if data is None:
        return None
    return [bytes(data[0]["body"]) + b" after"]
"""


def war(
    store: Path,
    name: str,
    spec: str,
    handler_source: str = FUNCTIONS,
    *,
    files: Mapping[str, bytes | str] | None = None,
    manifest: Mapping[str, Any] | None = None,
    file_name: str | None = None,
) -> Path:
    """Makes a `.war` in `store`.

    Args:
        store: the workflow store.
        name: the workflow's name, and the file's.
        spec: the text of its specification.
        handler_source: Python source of its functions.
        files: further files of the archive.
        manifest: the whole of MANIFEST.json instead of the usual one; {} for an archive without one.
        file_name: the archive's file name; `{name}.war` by default.
    """
    workflow = {"workflowName": name, "specFile": "spec.yaml", "handler": "functions.py"}
    usual = {"createdOn": "26/11/2026 19:00:00", "workflow": workflow, "archiverVersion": "0.2.15"}
    path = store / (file_name or f"{name}.war")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("spec.yaml", textwrap.dedent(spec))
        bundle.writestr("functions.py", textwrap.dedent(handler_source))
        if manifest is None or manifest:
            bundle.writestr("WAR-INF/MANIFEST.json", json.dumps(usual if manifest is None else manifest))
        for file, content in (files or {}).items():
            bundle.writestr(file, content)
    return path
