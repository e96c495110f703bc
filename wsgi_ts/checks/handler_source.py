"""What a handler's source imports, and what of that is not there."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsgi_ts.checks.difference import Difference, Level
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.ts_path import shim_path

_MOST_FILES = 200
#: Modules whose package is called otherwise.
_PACKAGES = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
#: Packages of PiPPy's that are not maintained any more, and what is here instead.
_GONE = {"pippy": "handlers on ts.handler_utils.distributed.pt_pippy need none: leave the import away"}


@dataclass(frozen=True)
class Import:
    """One imported name: the module, and what is taken from it ("" for the module itself).

    `is_optional`: it stands in a try, a function or a condition, so that nothing fails while it is not reached.
    """

    module: str
    name: str
    line: int
    is_optional: bool


def check_handler(file: Path, folder: Path, shown: str, requirements: Sequence[str]) -> Iterator[Difference]:
    """What a handler's file, and the files of the model that it imports, find or do not find.

    `shown` is the archive that `folder` was unpacked from, `requirements` are the lines of the model's requirements
    file.
    """
    wanted = {_normal(re.split(r"[^A-Za-z0-9._-]", line.strip(), maxsplit=1)[0]) for line in requirements}
    pending, seen = [file], {file}
    while pending and len(seen) < _MOST_FILES:
        source = pending.pop(0)
        place = f"{shown}!{source.relative_to(folder)}"
        try:
            tree = ast.parse(source.read_bytes())
        except SyntaxError as error:
            told = f"is no Python {sys.version_info[0]}.{sys.version_info[1]}: {error.msg}"
            yield Difference("FAIL", f"{place}:{error.lineno}", told, "correct it, or pack what it was made from")
            continue
        except (OSError, ValueError) as error:
            yield Difference("FAIL", place, f"cannot be read: {error}", "pack it again")
            continue
        for each in _within(tree.body, is_optional=False):
            own = _own_file(each, source.parent, folder)
            if own is not None:
                if own not in seen:
                    seen.add(own)
                    pending.append(own)
                continue
            found = _check_import(each, f"{place}:{each.line}", wanted)
            if found is not None:
                yield found


def _check_import(each: Import, where: str, wanted: set[str]) -> Difference | None:
    top = each.module.partition(".")[0]
    level: Level = "WARN" if each.is_optional else "FAIL"
    if top == "ts":
        missing = _missing_in_shim(each.module, each.name)
        if missing is None:
            return None
        told = f"imports {missing}, which this server does not have"
        advice = "derive from what there is (docs/handlers.md), or copy what is used into the archive"
        return Difference(level, where, told, advice)
    if top in sys.stdlib_module_names or not top:
        return None
    if top in _GONE:
        return Difference(level, where, f"imports {top}", _GONE[top])
    if is_installed(top):
        return None
    package = _PACKAGES.get(top, top)
    if _normal(package) in wanted:
        return None
    told = f"imports {top}, which is neither installed here nor in the model's requirements"
    return Difference(level, where, told, f"pip install {package}, where the server runs")


def _within(body: Sequence[ast.stmt], *, is_optional: bool) -> Iterator[Import]:
    """What statements import."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno, is_optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            yield from (Import(module, alias.name, node.lineno, is_optional) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            # The body of a class runs with its module; all others may never be reached.
            inner = is_optional or not isinstance(node, ast.ClassDef | ast.With)
            for field in ("body", "orelse", "finalbody"):
                yield from _within(getattr(node, field, None) or (), is_optional=inner)
            for handler in getattr(node, "handlers", ()):
                yield from _within(handler.body, is_optional=True)


def _own_file(each: Import, beside: Path, folder: Path) -> Path | None:
    """The file of a module of the model's own."""
    dots = len(each.module) - len(each.module.lstrip("."))
    base = beside
    for _ in range(dots - 1):
        base = base.parent
    parts = [part for part in each.module.lstrip(".").split(".") if part]
    places = (base,) if dots else (beside, folder)
    for place in places:
        for names in ([*parts, each.name], parts):
            if not any(names) or "*" in names:
                continue
            path = place.joinpath(*(name for name in names if name))
            for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
                if candidate.is_file() and candidate.is_relative_to(folder):
                    return candidate
    return None


def _missing_in_shim(module: str, name: str) -> str | None:
    """The module, or the name in it, that `import ts…` would not find; None where it finds everything."""
    path = Path(shim_path(), *module.split("."))
    file = next((each for each in (path.with_name(f"{path.name}.py"), path / "__init__.py") if each.is_file()), None)
    if file is None:
        return None if path.is_dir() and not name else module
    if not name or name == "*":
        return None
    if (path / f"{name}.py").is_file() or (path / name).is_dir():
        return None
    tree = ast.parse(file.read_bytes())
    return None if name in set(_defined(tree)) else f"{name} from {module}"


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def is_installed(module: str) -> bool:
    """Whether a module can be found; the packages that it is in are imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
