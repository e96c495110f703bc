"""Compiled modules: when they run in the place of their sources, and how they get into a wheel."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from wsgi_ts import CompiledModules, compiled_modules
from wsgi_ts.checks.machine import check_compiled

REPOSITORY = Path(__file__).resolve().parents[2]
#: Says how a process runs, and what it has found in a module that can be compiled.
LOOK = (
    "import wsgi_ts, wsgi_ts.http.body as body; "
    "print(wsgi_ts.compiled_modules.describe(), body.__file__.endswith('.so'), hasattr(body, 'edited'), sep='|')"
)
needs_compiled = pytest.mark.skipif(not compiled_modules.modules, reason=f"this tree is {compiled_modules.describe()}")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two modules, of which `hot` has been compiled and imports `cold`."""
    monkeypatch.delenv(CompiledModules.SWITCH, raising=False)
    made = CompiledModules(str(tmp_path))
    Path(made.folder).mkdir(parents=True)
    lines = []
    for source, module in (("hot.py", "wsgi_ts.hot"), ("cold.py", "")):
        text = f"# {source}\n".encode()
        (tmp_path / source).write_bytes(text)
        lines.append(f"{made.hash_of(text)} {source} {module}\n")
    Path(made.stated).write_text("".join(lines))
    return tmp_path


def test_what_was_compiled_from_these_sources_is_imported(package: Path) -> None:
    made = CompiledModules(str(package))
    assert made.modules == {"wsgi_ts.hot"}
    assert made.describe() == "compiled (1 modules)"
    spec = made.find_spec("wsgi_ts.hot")
    assert spec is not None
    assert Path(str(spec.origin)).parent == Path(made.folder)
    assert made.find_spec(CompiledModules.LIBRARY) is not None
    assert made.find_spec("wsgi_ts.cold") is made.find_spec("json") is None


def test_touched_and_unchanged_is_unchanged(package: Path) -> None:
    os.utime(package / "hot.py", (1, 1))
    assert CompiledModules(str(package)).modules


@pytest.mark.parametrize("source", ["hot.py", "cold.py"], ids=["a compiled source", "a source that one imports"])
def test_nothing_compiled_is_imported_when_a_source_has_changed(package: Path, source: str) -> None:
    stat = (package / source).stat()
    (package / source).write_bytes((package / source).read_bytes().upper())
    os.utime(package / source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    made = CompiledModules(str(package))
    assert made.find_spec("wsgi_ts.hot") is made.find_spec(CompiledModules.LIBRARY) is None
    assert made.describe() == f"interpreted: {source} has changed since it was compiled"


def test_nothing_compiled_is_imported_when_a_source_has_gone(package: Path) -> None:
    (package / "cold.py").unlink()
    made = CompiledModules(str(package))
    assert not made.modules
    assert made.describe() == f"interpreted: {package / 'cold.py'} is missing"


def test_what_another_python_has_compiled_is_not_imported(package: Path) -> None:
    Path(CompiledModules(str(package)).folder).rename(package / "_compiled" / "cpython-1-other")
    made = CompiledModules(str(package))
    assert not made.modules
    assert made.describe() == "interpreted: not compiled for this Python"


def test_a_process_looks_once(package: Path) -> None:
    made = CompiledModules(str(package))
    assert made.modules
    (package / "hot.py").write_text("edited")
    assert made.find_spec("wsgi_ts.hot") is not None


def test_a_variable_switches_it_off(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSGI_TS_COMPILED", "0")
    made = CompiledModules(str(package))
    assert made.find_spec("wsgi_ts.hot") is None
    assert made.describe() == "interpreted: WSGI_TS_COMPILED=0"


def test_what_ci_runs_is_compiled() -> None:
    assert compiled_modules.modules or os.environ.get("WSGI_TS_COMPILED") != "1", compiled_modules.describe()


@pytest.mark.parametrize(
    ("variable", "change", "level", "text"),
    [
        (None, False, "OK", "compiled (1 modules)"),
        ("0", False, "OK", "interpreted: WSGI_TS_COMPILED=0"),
        (None, True, "WARN", "interpreted: hot.py has changed since it was compiled; requests cost more CPU time"),
    ],
)
def test_the_doctor_says_what_runs(
    package: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, change: bool, level: str, text: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("WSGI_TS_COMPILED", variable)
    if change:
        (package / "hot.py").write_text("edited")
    monkeypatch.setattr("wsgi_ts.checks.machine.compiled_modules", CompiledModules(str(package)))
    (finding,) = check_compiled()
    assert (finding.level, finding.subject) == (level, "data path")
    assert finding.text.startswith(text)


# The modules of this tree


def look(tree: Path, **variables: str) -> list[str]:
    """What `LOOK` prints in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != CompiledModules.SWITCH}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tree, env=environment | {"PYTHONPATH": str(tree)} | variables,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip().split("|")


@needs_compiled
def test_a_tree_runs_as_python_from_an_edit_on(tmp_path: Path) -> None:
    # By the links, as in a checkout, the folders beside wsgi_ts are reached as well.
    shutil.copytree(REPOSITORY / "wsgi_ts", tmp_path / "wsgi_ts")
    compiled = f"compiled ({len(compiled_modules.modules)} modules)"
    assert look(tmp_path) == [compiled, "True", "False"]
    assert look(tmp_path, WSGI_TS_COMPILED="0") == ["interpreted: WSGI_TS_COMPILED=0", "False", "False"]
    source = tmp_path / "wsgi_ts" / "http" / "body.py"
    text = source.read_text()
    source.write_text(f"{text}\nedited = True\n")
    assert look(tmp_path) == ["interpreted: http/body.py has changed since it was compiled", "False", "True"]
    source.write_text(text)
    assert look(tmp_path) == [compiled, "True", "False"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a wheel is made of, in a folder of its own."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("wsgi_ts", "model_archiver", "workflow_archiver"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("_compiled", "__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    yield folder
    shutil.rmtree(folder)


def make_wheel(sources: Path, options: Sequence[str], variables: dict[str, str]) -> Path:
    """Makes a wheel as pip does, without an environment of its own."""
    environment = {name: value for name, value in os.environ.items() if name != CompiledModules.SWITCH} | variables
    dist = sources / f"dist{len(list(sources.glob('dist*')))}"
    command = [sys.executable, "setup.py", "--quiet", *options, "bdist_wheel", "--dist-dir", str(dist)]
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = dist.iterdir()
    return wheel


@needs_compiled
def test_a_wheel_carries_the_compiled_modules(sources: Path, tmp_path: Path) -> None:
    # The build finds what was compiled of these sources before: compiling takes half a minute.
    built = CompiledModules(str(sources / "built" / "wsgi_ts"))
    shutil.copytree(compiled_modules.folder, built.folder)
    os.utime(built.stated)
    wheel = make_wheel(sources, ["build", "--build-lib", "built"], {})
    assert re.search(r"-cp3\d+-cp3\d+-linux_", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "wsgi_ts_imports.pth").read_text() == "wsgi_ts/ts_shim\n"
    assert look(tmp_path / "site") == [f"compiled ({len(compiled_modules.modules)} modules)", "True", "False"]


def test_a_wheel_without_them_is_for_every_machine(sources: Path) -> None:
    wheel = make_wheel(sources, ["build", "--build-lib", "pure"], {"WSGI_TS_COMPILED": "0"})
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "wsgi_ts/batcher/shm/ring.py" in names
    assert not [name for name in names if "_compiled" in name]


def test_a_wheel_makes_ts_importable_behind_an_installed_torchserve(sources: Path, tmp_path: Path) -> None:
    wheel = make_wheel(sources, ["build", "--build-lib", "pure"], {"WSGI_TS_COMPILED": "0"})
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import site, sys, importlib.util as u; site.addsitedir(sys.argv[1]); print(u.find_spec('ts').origin)"

    def found() -> str:
        command = [sys.executable, "-I", "-S", "-c", code, str(site)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert found() == str(site / "wsgi_ts" / "ts_shim" / "ts" / "__init__.py")
    (site / "ts").mkdir()
    (site / "ts" / "__init__.py").touch()
    assert found() == str(site / "ts" / "__init__.py")


def test_without_a_compiler_it_says_why(sources: Path) -> None:
    environment = os.environ | {"CC": "/nonexistent/cc", CompiledModules.SWITCH: ""}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "none"]
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "==> not compiled, everything runs as Python: there is no C compiler (/nonexistent/cc)\n"
    assert not (sources / "none").exists()
    environment[CompiledModules.SWITCH] = "1"
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no C compiler" in done.stderr


def test_the_build_states_every_source_that_it_depends_on() -> None:
    spec = importlib.util.spec_from_file_location("setup", REPOSITORY / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    read, compiled = set(map(str, build.sources_read())), set(build.COMPILED)
    assert compiled <= read
    assert {"wsgi_ts/errors.py", "wsgi_ts/batcher/shm/shared_memory.py"} <= read - compiled
    if compiled_modules.modules:
        assert compiled_modules.modules == set(map(build.module_name, compiled))
