"""What the sources of the handlers promise: nothing that a request carries is unpickled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import wsgi_ts.handlers

FOLDER = Path(wsgi_ts.handlers.__path__[0])
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

#: The functions that read files of the archive with something that may unpickle, and nothing else does.
READS_OF_ARCHIVES = {
    "base.py: _load_weights: torch.load",
    "base.py: _load_torchscript_model: torch.jit.load",
    "base.py: _load_exported_program: torch.export.load",
    "text_utils.py: _read: torch.load",
}


def loads(path: Path) -> Iterator[str]:
    """Every call of something named torch.….load, with the function that it stands in."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call):
                    name = ast.unparse(call.func)
                    if name.endswith(".load") and name.startswith(("torch.", "numpy.", "np.")):
                        yield f"{path.name}: {function.name}: {name}"


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_only_files_of_the_archive_are_loaded() -> None:
    assert {load for path in FOLDER.rglob("*.py") for load in loads(path)} == READS_OF_ARCHIVES


def test_no_module_imports_an_unpickler() -> None:
    sources = [*FOLDER.rglob("*.py"), *(FOLDER.parent / "ts_shim").rglob("*.py")]
    assert len(sources) > 50
    assert [path for path in sources if UNPICKLERS & set(imported(path))] == []
