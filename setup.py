"""Compiles the modules that every request goes through to machine code, by mypyc, and makes `ts` importable.

setup.cfg says all the rest.

    python setup.py build_ext --build-lib .      into this tree: what `make install` does
    pip wheel .  and  pip install .              into the wheel

Without a C compiler nothing is compiled, and everything runs as Python. WSGI_TS_COMPILED=0 has the same effect;
WSGI_TS_COMPILED=1 makes it an error. How they are found again, and never run when a source has changed since, is in
`wsgi_ts/__init__.py`.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from wsgi_ts import CompiledModules  # noqa: E402

#: What a request goes through in web worker, batcher and model worker. Left to the interpreter: what users subclass or
#: hand values of any type to, what is called a few times in a process, and the loops of main threads and of threads
#: beside others (only the interpreter looks for signals and lets other threads run).
COMPILED = (
    *(f"wsgi_ts/batcher/scheduler/{name}.py" for name in (
        "actions", "counters", "halving", "job", "loop", "model_queue", "plugin_queue", "policy", "recovered",
        "redelivery", "scheduler", "segments", "sequences",
    )),
    *(f"wsgi_ts/batcher/shm/{name}.py" for name in (
        "board", "body_codec", "client", "doorbell", "layout", "mailbox", "request_codec", "ring", "segment", "stream",
        "worker_layout",
    )),
    "wsgi_ts/batcher/worker/slots.py",
    *(f"wsgi_ts/dataplane/{name}.py" for name in (
        "async_call", "async_plane", "attempts", "call_traces", "exchange", "graph", "graph_walk",
        "ledger", "node_answers", "node_requests", "request_traces", "routes", "stories", "task", "timings", "walk",
        "walk_counters", "walks",
    )),
    "wsgi_ts/http/body.py",
    "wsgi_ts/http/head.py",
    *(f"wsgi_ts/http2/{name}.py" for name in (
        "connection", "faults", "frames", "header_blocks", "outbox", "refusal", "stream",
    )),
    "wsgi_ts/logs/access.py",
    "wsgi_ts/logs/request_line.py",
    "wsgi_ts/rest/direct.py",
    *(f"wsgi_ts/rpc/{name}.py" for name in (
        "call", "calls", "connection", "inference", "port", "prediction", "wire",
    )),
    "wsgi_ts/supervisor/spans.py",
    *(f"wsgi_ts/tracing/{name}.py" for name in ("context", "slowest", "span_codec")),
    *(f"wsgi_ts/web/{name}.py" for name in (
        "answers", "bodies", "connection", "http_times", "loop", "report", "requests", "sampled_report", "sending",
        "table", "told",
    )),
)  # fmt: skip
#: Types are what `make lint` looks at; here no package but ours counts, so that every machine makes the same code.
MYPY_OPTIONS = ["--config-file=", "--no-site-packages", "--ignore-missing-imports", "--disable-error-code=misc"]
OPTIMIZATION = "2"


def why_not() -> str:
    """Returns why nothing can be compiled here; empty where it can."""
    if os.environ.get(CompiledModules.SWITCH) == "0":
        return f"{CompiledModules.SWITCH}=0"
    if sys.implementation.name != "cpython":
        return f"mypyc knows CPython only, and this is {sys.implementation.name}"
    try:
        import mypyc.build  # noqa: F401
    except ImportError:
        return "mypyc is not installed"
    return why_no_compiler()


def why_no_compiler() -> str:
    """Returns why an extension module cannot be compiled here; empty where it can."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.c")
        source.write_text("#include <Python.h>\n")
        try:
            tried = subprocess.run(
                [*command.split(), "-fsyntax-only", f"-I{sysconfig.get_path('include')}", str(source)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError:
            return f"there is no C compiler ({command})"
    return f"{command} cannot compile with Python.h: {tried.stderr.strip()}" if tried.returncode else ""


def say(text: str) -> None:
    """Prints a line at once; pip shows it with --verbose."""
    print(f"==> {text}", flush=True)


def sources_read() -> dict[Path, bytes]:
    """All of our modules that the compiler reads, by their paths: those to compile, and what they import."""
    found: dict[Path, bytes] = {}
    waiting = [Path(source) for source in COMPILED]
    while waiting:
        source = waiting.pop()
        if source in found:
            continue
        found[source] = (ROOT / source).read_bytes()
        waiting += imported_by(found[source])
    return found


def module_name(source: str) -> str:
    """Returns what a source is imported as."""
    return source.removesuffix(".py").replace("/", ".")


def imported_by(text: bytes) -> Iterator[Path]:
    """Yields the paths of our modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        for name in names:
            path = Path(*name.split("."))
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if name.startswith("wsgi_ts.") and (ROOT / file).is_file():
                    yield file


class CompileModules(build_ext):
    """`build_ext`: from our sources by C to extension modules."""

    def run(self) -> None:
        """Compiles all, and states last of all what they were compiled from."""
        if self.editable_mode:
            say("not compiled: an editable install leaves that to `make install`")
            return
        reason = why_not()
        if reason:
            if os.environ.get(CompiledModules.SWITCH) == "1":
                raise SystemExit(f"setup.py: cannot compile: {reason}")
            say(f"not compiled, everything runs as Python: {reason}")
            return
        import mypyc
        from mypyc.build import mypycify

        started = time.monotonic()
        self._made = CompiledModules(str(Path(self.build_lib, "wsgi_ts").resolve()))
        stated = self._made.stated
        if self._made.modules == set(map(module_name, COMPILED)) and not newer_group(
            [__file__, mypyc.__file__], stated
        ):
            say(f"{len(COMPILED)} modules are compiled, and have not changed")
            return
        Path(self._made.folder).mkdir(parents=True, exist_ok=True)
        Path(stated).unlink(missing_ok=True)
        read = sources_read()
        say(f"compiling {len(COMPILED)} modules, from Python to C")
        generated = Path(self.build_temp, "mypyc")
        self.extensions = mypycify(
            [*MYPY_OPTIONS, f"--cache-dir={generated / 'cache'}", *COMPILED],
            opt_level=OPTIMIZATION,
            debug_level="0",
            multi_file=True,
            group_name=CompiledModules.LIBRARY.removesuffix("__mypyc"),
            target_dir=str(generated),
        )
        if read != sources_read():
            raise SystemExit("setup.py: a source has changed while it was compiled: begin again")
        for each in self.extensions:
            each._needs_stub = False  # as setuptools does with those that it is told of before
        self.parallel = len(os.sched_getaffinity(0))
        super().run()
        self._state(read)
        say(f"compiled {len(COMPILED)} modules in {time.monotonic() - started:.0f} s")

    def build_extensions(self) -> None:
        """Compiles the C files on all cores, each with a line of progress; setuptools takes one after the other."""
        compiler = self.compiler
        compile_files = compiler.compile

        def compile_file(source: str, *, depends: list[str], **options: Any) -> str:
            target: str = compiler.object_filenames([source], output_dir=options["output_dir"])[0]
            if newer_group([source, *depends], target):
                name = Path(source).stem.replace("___", "/")
                if "/" in name:
                    print(f"    {name.removeprefix('__native_')}", flush=True)
                compile_files([source], **options)
            return target

        def compile_in_parallel(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(self.parallel) as threads:
                return list(threads.map(lambda source: compile_file(source, **options), sources))

        compiler.compile = compile_in_parallel
        super().build_extensions()

    def get_ext_fullpath(self, ext_name: str) -> str:
        """Returns where an extension module goes: all of them into one folder."""
        return os.path.join(self._made.folder, ext_name + EXTENSION_SUFFIXES[0])

    def get_outputs(self) -> list[str]:
        """Returns all files that this command makes."""
        made = [self.get_ext_fullpath(each.name) for each in self.extensions or ()]
        return [*made, self._made.stated] if made else []

    def _state(self, read: dict[Path, bytes]) -> None:
        """Writes what the modules were compiled from."""
        lines = []
        for source, text in sorted(read.items()):
            module = module_name(str(source)) if str(source) in COMPILED else ""
            lines.append(f"{CompiledModules.hash_of(text)} {source.relative_to('wsgi_ts').as_posix()} {module}\n")
        Path(self._made.stated).write_text("".join(lines), encoding="utf-8")


class InstallTsPath(Command):
    """Puts the folder of `ts` at the end of `sys.path`: there an installed TorchServe is found before it.

    It stands for `install_data`, which both a wheel and an editable install run.
    """

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """Begins with nothing."""
        self.written = ""
        self.install_dir = ""

    def finalize_options(self) -> None:
        """Takes the folder that our packages go to."""
        self.install_dir = self.get_finalized_command("install").install_lib

    def run(self) -> None:
        """Writes the line that `site` reads: from the packages' own folder, or, for this tree, from its root."""
        shim = Path("wsgi_ts", "ts_shim")
        is_editable = self.distribution.get_command_obj("build_py").editable_mode
        self.mkpath(self.install_dir)
        self.written = os.path.join(self.install_dir, "wsgi_ts_imports.pth")
        say(f"{self.written}: where `ts` is found")
        Path(self.written).write_text(f"{ROOT / shim if is_editable else shim}\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        """Returns all files that this command makes."""
        return [self.written]


class WithExtensions(Distribution):
    """What setuptools has to know of before it is made.

    There will be extension modules, with which a wheel is for one platform, and a file beside the packages.
    """

    def has_ext_modules(self) -> bool:
        """Returns whether something can be compiled here."""
        return not why_not()

    def has_data_files(self) -> bool:
        """Returns whether `install_data` is run."""
        return True

    has_data = has_data_files  # as an editable install asks for it


if __name__ == "__main__":
    setup(distclass=WithExtensions, cmdclass={"build_ext": CompileModules, "install_data": InstallTsPath})
