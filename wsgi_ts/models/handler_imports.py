"""Whether a handler needs what is imported once for all model workers: `preload_modules` (torch), numpy.

Its workers need not wait for an import that it does not need. This is a guess from the handler's source, on the safe
side: where it is wrong a worker imports by itself what it needs, which takes longer and memory of its own.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Modules of Python's own with which a handler may import any other.
_IMPORTERS = frozenset({"importlib", "runpy", "pkgutil", "imp", "pickle"})
_IMPORTING_CALLS = frozenset({"__import__", "exec", "eval"})
_NUMPY = "numpy"
#: What every worker has, or gets in a moment: Python's own modules, numpy, those of ours that import nothing else.
_AT_HAND = (frozenset(sys.stdlib_module_names) - _IMPORTERS) | {_NUMPY, "__future__"}
OURS_AT_HAND = (
    "ts.context",
    "ts.metrics",
    "ts.protocol",
    "ts.service",
    "wsgi_ts.handlers.metrics",
    "wsgi_ts.handlers.serving",
)
#: A handler of more files or bytes is not read.
_MOST_FILES = 16
_MOST_BYTES = 1_000_000


class Needs(NamedTuple):
    """What a handler needs of what its worker template imports: the preloaded modules, numpy."""

    preloaded: bool
    numpy: bool


def needs_of(handler: str, model_dir: Path) -> Needs:
    """What a handler needs, as far as its source tells: everything where it imports more than every worker has.

    It is given as a manifest names it: `file.py`, `module:function`, the name of a bundled one.
    """
    everything = Needs(preloaded=True, numpy=True)
    numpy = False
    file = model_dir / handler.partition(":")[0]
    if not file.name:
        return everything
    # Of a bundled handler there is no such file, and it does need torch.
    pending = [file.with_name(f"{file.name.removesuffix('.py')}.py")]
    folders = {pending[0].parent, model_dir}
    seen: set[Path] = set()
    while pending:
        source = pending.pop()
        seen.add(source)
        if len(seen) > _MOST_FILES:
            return everything
        try:
            text = source.read_bytes()
            imported = set(_imported(ast.parse(text))) if len(text) <= _MOST_BYTES else {"?"}
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            return everything
        for name in imported:
            own = _own_module(name, folders)
            if own is not None:
                pending += [own] if own not in seen else []
            elif not _is_at_hand(name):
                return everything
            elif name.partition(".")[0] == _NUMPY:
                numpy = True
    return Needs(preloaded=False, numpy=numpy)


def _imported(tree: ast.AST) -> Iterator[str]:
    """The names of all modules that a source imports, wherever in it; `?` stands for one that cannot be told."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Relative: a package of the model's.
            yield node.module if node.module and not node.level else "?"
        elif isinstance(node, ast.Name) and node.id in _IMPORTING_CALLS:
            yield "?"


def _own_module(name: str, folders: set[Path]) -> Path | None:
    """The file of a module of the model's own; None where it has none, or a package."""
    for folder in folders:
        if (folder / f"{name}.py").is_file() and not (folder / name).is_dir():
            return folder / f"{name}.py"
    return None


def _is_at_hand(name: str) -> bool:
    top = name.partition(".")[0]
    return top in _AT_HAND or any(name == ours or name.startswith(f"{ours}.") for ours in OURS_AT_HAND)
