"""The functions of a workflow's handler file, found by reading it: nothing of it is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FoundFunction:
    """A name at the top of the file that may be a function.

    Attributes:
        line: where it is defined, from 1.
        takes_two: whether it can be called with (data, context); None where only running the file would tell.
    """

    line: int
    takes_two: bool | None


@dataclass(frozen=True, slots=True)
class HandlerFile:
    """What a handler file defines.

    Attributes:
        functions: by name.
        is_open: whether it may define more than can be seen: `from x import *`, `globals()`, a module's `__getattr__`.
        has_one_class: whether it defines exactly one class; the server then uses that one's `handle` for a function
            that is missing.
    """

    functions: Mapping[str, FoundFunction]
    is_open: bool
    has_one_class: bool

    def has(self, name: str) -> bool:
        """Whether the server would find this function, as far as can be seen."""
        return name in self.functions or self.is_open or self.has_one_class


def read_handler_file(path: Path) -> HandlerFile:
    """Reads a handler file.

    Raises:
        SyntaxError: it is no Python; the line is in it.
        OSError: it cannot be read.
    """
    try:
        tree = ast.parse(path.read_bytes(), path.name)
    except ValueError as error:
        raise SyntaxError(str(error), (path.name, 1, None, None)) from error
    found: dict[str, FoundFunction] = {}
    is_open = False
    classes = 0
    for node in _top_level(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = FoundFunction(node.lineno, None if node.decorator_list else _takes_two(node.args))
        elif isinstance(node, ast.ClassDef):
            found[node.name] = FoundFunction(node.lineno, None)
            classes += 1
        elif isinstance(node, ast.Import | ast.ImportFrom):
            is_open = is_open or any(alias.name == "*" for alias in node.names)
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = FoundFunction(node.lineno, None)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for name, takes_two in _assigned(node):
                found[name] = FoundFunction(node.lineno, takes_two)
    is_open = (
        is_open
        or "__getattr__" in found
        or any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("globals", "exec", "setattr")
            for node in ast.walk(tree)
        )
    )
    return HandlerFile(found, is_open, classes == 1)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the file is imported, those of `if`, `try`, `with` and loops included."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(node, field, None)
            if isinstance(inner, list) and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _top_level(inner)
        for handler in getattr(node, "handlers", []):
            yield from _top_level(handler.body)


def _assigned(node: ast.Assign | ast.AnnAssign) -> Iterator[tuple[str, bool | None]]:
    takes_two = _takes_two(node.value.args) if isinstance(node.value, ast.Lambda) else None
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                yield name.id, takes_two


def _takes_two(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    required = positional - len(arguments.defaults)
    needs_keywords = any(default is None for default in arguments.kw_defaults)
    return not needs_keywords and required <= 2 and (positional >= 2 or arguments.vararg is not None)
