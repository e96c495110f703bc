"""The names that handlers lean on in libraries: each is there in what is installed, and none is used unlisted."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.server import REPOSITORY

from wsgi_ts.handlers.toolkit.library_names import LIBRARY_NAMES, LibraryName

#: What lets an ill-matched torchvision be imported.
SITE = REPOSITORY / "tests" / "support" / "torchvision_cpu"
CHECK = Path(__file__).with_name("library_names_check.py")
LIBRARIES = sorted({name.library for name in LIBRARY_NAMES})
#: Other libraries that a handler must not use without a line in the list.
WATCHED = {*LIBRARIES, "accelerate", "datasets", "optimum", "peft", "sentencepiece", "tokenizers"} - {"torch"}


@pytest.fixture(scope="module")
def faults() -> dict[str, str | None]:
    """What is wrong with each name, None where its library is not installed."""
    paths = {"PYTHONPATH": os.pathsep.join([str(SITE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(CHECK), *LIBRARIES]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*map(str, LIBRARY_NAMES), "models"])
def test_the_library_has_what_is_leaned_on(faults: dict[str, str | None], name: str) -> None:
    fault = faults[name]
    if fault is None:
        pytest.skip("the library is not installed")
    assert not fault, fault


def uses(path: Path) -> Iterator[tuple[str, str | None]]:
    """The modules of watched libraries that a file imports, and the name from it, None for the module itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[tuple[str, str | None]] = []
        if isinstance(node, ast.ImportFrom):
            found = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_extra", "import_module"):
                found = [(str(node.args[0].value), None)]
        yield from (each for each in found if each[0].partition(".")[0] in WATCHED)


def test_nothing_is_used_that_is_not_in_the_list() -> None:
    listed = {(module, name.name.partition(".")[0]) for name in LIBRARY_NAMES for module in name.modules}
    modules = {module for module, _ in listed}
    used = [(path, *use) for path in (REPOSITORY / "handlers").rglob("*.py") for use in uses(path)]
    assert len(used) > 2, "found no use at all"
    unlisted = [
        f"{path.name}: {module} {name or ''}"
        for path, module, name in used
        if (module, name) not in listed and not (name is None and module in modules)
    ]
    assert unlisted == []


def test_the_list_imports_none_of_the_libraries() -> None:
    script = (
        "import sys, wsgi_ts.handlers.toolkit.library_names; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert set(loaded.stdout.split()) & {*LIBRARIES} == set()


# Looking a name up


def test_a_name_is_found_where_this_version_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = ModuleType("some_old_place")
    old.build, old.__version__ = print, "1.2"
    monkeypatch.setitem(sys.modules, "some_old_place", old)
    assert LibraryName("build", ("some_new_place", "some_old_place")).load("A handler") is print
    with pytest.raises(ImportError, match=r"some_old_place \(1\.2\) has no take\.down in some_old_place"):
        LibraryName("take.down", ("some_old_place",)).load("A handler")


def test_a_module_that_is_there_but_broken_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_broken_place.py").write_text("raise RuntimeError('no GPU')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="no GPU"):
        LibraryName("build", ("some_broken_place", "some_old_place")).load("A handler")


def test_a_package_that_a_library_lacks_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_hungry_place.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match="no_such_package_at_all"):
        LibraryName("build", ("some_hungry_place", "some_old_place")).load("A handler")
