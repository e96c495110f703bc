"""Python environments for models that bring dependencies of their own.

An environment is a virtual environment that also sees the packages of the interpreter it was made with. What the
requirements ask for and what is not there in a fitting version lies in the environment, and is found first. One is made
for each distinct content of requirements and interpreter, once, and shared by models, versions, restarts and instances:

    {XDG_CACHE_HOME or ~/.cache}/wsgi-ts/environments/{key}/       the environment; `complete` in it is written last
    {XDG_CACHE_HOME or ~/.cache}/wsgi-ts/environments/{key}.lock   held while it is made
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from wsgi_ts.errors import ModelFailed
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

#: How long making one environment may take, in seconds: large packages over a slow line.
BUILD_LIMIT_S = 1800.0
_KEPT_LINES = 20
_POLL_S = 0.5
_COMPLETE = "complete"
_PATHS_FILE = "inherited-site-packages.pth"
#: Asks an interpreter what its packages are.
_QUESTION = (
    "import json, site, sys, sysconfig; "
    "folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]; "
    "print(json.dumps([sys.version, sys.prefix, folders]))"
)
#: Runs a program that ends with the thread that started it, instead of outliving a server that is killed.
_TETHERED = (
    "import ctypes, os, runpy, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "parent, module = int(sys.argv[1]), sys.argv[2]; del sys.argv[1:3]; "
    "sys.exit(1) if os.getppid() != parent else runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


class _BuildError(Exception):
    """A step of the making failed; the message is for the log."""


class ModelEnvironments:
    """The environments that one server makes and uses.

    Args:
        python: the interpreter that they are made with.
        environ: the server's environment variables.
        stopping: whether the server stops; ends what is under way.
    """

    def __init__(self, python: str, environ: Mapping[str, str], stopping: Callable[[], bool] = lambda: False) -> None:
        self._python = python
        self._environ = dict(environ)
        self._stopping = stopping
        self._folder = cache_folder(environ) / "environments"

    def provide(self, name: str, model_dir: Path, requirements: str | None, limit_s: float = BUILD_LIMIT_S) -> str:
        """The interpreter of the environment that a model needs; made if there is none yet.

        Args:
            name: the model, for errors and logs.
            model_dir: its directory; relative paths in the requirements start here.
            requirements: its requirements file there; None: an environment without additions.
            limit_s: how long the making may take, in seconds.

        Raises:
            ModelFailed: it could not be made, with TorchServe's texts; the reason is in the log.
        """
        failure = f"Virtual environment creation failed for model {name}"
        deadline = time.monotonic() + limit_s
        try:
            if requirements is not None and not (model_dir / requirements).is_file():
                raise _BuildError(f"the requirements file {requirements} is not in the archive")
            version, prefix, folders = json.loads(self._ask(_QUESTION))
            key = environment_key([version, prefix], folders, model_dir, requirements)
            place = self._folder / key
            _make_private(self._folder)
            with self._locked(key, deadline):
                if not (place / _COMPLETE).is_file():
                    log.info("Making the Python environment %s for model %s", place, name)
                    with _removed_on_failure(place):
                        self._create(place, folders, deadline)
                        if requirements is not None:
                            failure = f"Custom pip package installation failed for model {name}"
                            self._install(place, name, model_dir, requirements, deadline)
                        (place / _COMPLETE).touch()
        except (_BuildError, OSError, ValueError) as error:
            log.error("%s: %s", failure, error)
            raise ModelFailed(failure) from error
        return str(place / "bin" / "python")

    def _create(self, place: Path, folders: Sequence[str], deadline: float) -> None:
        self._run([self._python, "-m", "venv", "--without-pip", str(place)], place.parent, "venv", deadline)
        python = str(place / "bin" / "python")
        own = json.loads(self._ask("import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))", python))
        lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
        Path(own, _PATHS_FILE).write_text("\n".join([*lines, ""]), encoding="utf-8")
        try:
            self._ask("import pip", python)
        except _BuildError:
            # An interpreter without pip of its own, as some tools make them.
            self._run([python, "-m", "ensurepip"], place, "ensurepip", deadline)

    def _install(self, place: Path, name: str, model_dir: Path, requirements: str, deadline: float) -> None:
        command = [str(place / "bin" / "python"), "-c", _TETHERED, str(os.getpid()), "pip", "install"]
        command += ["--no-input", "--disable-pip-version-check", "--no-color", "--progress-bar", "off"]
        command += ["--upgrade", "--upgrade-strategy", "only-if-needed", "--requirement", requirements]
        self._run(command, model_dir, f"pip for model {name}", deadline)

    def _ask(self, code: str, python: str | None = None) -> str:
        """What an interpreter prints."""
        command = [python or self._python, "-c", code]
        try:
            done = subprocess.run(
                command, env=self._environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _BuildError(f"{command[0]} cannot be run: {error}") from error
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise _BuildError(f"{command[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}")
        return done.stdout.decode()

    def _run(self, command: Sequence[str], cwd: Path, label: str, deadline: float) -> None:
        """Runs one step; every line it prints goes to the log."""
        last: deque[str] = deque(maxlen=_KEPT_LINES)
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for line in self._lines(process, deadline):
                last.append(line)
                log.info("%s: %s", label, line)
            code = process.wait()
        finally:
            # What it has started goes too; where it has ended by itself there is nothing left to kill.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if code != 0:
            shown = "\n".join(last)
            raise _BuildError(f"{shlex.join(command[:3])} ended with exit code {code}; its last lines:\n{shown}")

    def _lines(self, process: subprocess.Popen[bytes], deadline: float) -> Iterator[str]:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while True:
                if self._stopping():
                    raise _BuildError("the server is stopping")
                if time.monotonic() >= deadline:
                    raise _BuildError("it took too long and was ended")
                if not selector.select(_POLL_S):
                    continue
                data = os.read(fd, 65536)
                *lines, rest = (rest + data).split(b"\n")
                yield from (line.decode(errors="replace").rstrip() for line in lines)
                if not data:
                    yield from [rest.decode(errors="replace")] if rest else []
                    return

    @contextlib.contextmanager
    def _locked(self, key: str, deadline: float) -> Iterator[None]:
        """Holds the lock of one environment; whoever made it meanwhile, here or in another instance, is waited for."""
        fd = os.open(self._folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if self._stopping() or time.monotonic() >= deadline:
                    raise _BuildError("another process was still making the environment")
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)


def interpreter(config: Config) -> str:
    """The interpreter that the key `python` names, with its path; `sys.executable` where that is the one."""
    found = shutil.which(config.python) or config.python
    # A virtual environment has several names of one file, and shares that file with others.
    same_folder = os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)
    with contextlib.suppress(OSError):
        if same_folder and os.path.samefile(found, sys.executable):
            return sys.executable
    return found


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the server keeps what it can make again: `wsgi-ts` in XDG_CACHE_HOME, or in ~/.cache."""
    base = environ.get("XDG_CACHE_HOME", "")
    # The standard has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "wsgi-ts"


def environment_key(
    interpreter: Sequence[str], folders: Sequence[str], model_dir: Path, requirements: str | None
) -> str:
    """The name of the environment for an interpreter, whose packages lie in `folders`, and a requirements file.

    The content of files that the requirements name (wheels, further lists) counts, and so do the packages that the
    environment would see: what was left out because it was there must still be there. Relative paths in the
    requirements start in `model_dir`.
    """
    digest = hashlib.sha256("\0".join(interpreter).encode())
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            installed = sorted(name for name in os.listdir(folder) if name.endswith((".dist-info", ".egg-info")))
            digest.update("\0".join([folder, *installed]).encode(errors="surrogateescape"))
    if requirements is not None:
        _digest_file(digest, model_dir / requirements, model_dir, set())
    return digest.hexdigest()[:32]


def _digest_file(digest: hashlib._Hash, file: Path, model_dir: Path, seen: set[Path]) -> None:
    seen.add(file)
    content = file.read_bytes()
    digest.update(b"\0file\0" + content)
    if file.suffix not in (".txt", ".in"):
        return
    for word in content.decode(errors="replace").replace("=", " ").split():
        for base in (model_dir, file.parent):
            named = base / word.removeprefix("file://")
            with contextlib.suppress(OSError, ValueError):
                if named not in seen and named.is_file():
                    _digest_file(digest, named, model_dir, seen)


def _make_private(folder: Path) -> None:
    """Makes the folder, whose content is run, for this user alone; raises _BuildError where it is another's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise _BuildError(f"{folder} belongs to another user; set XDG_CACHE_HOME to a directory of your own")
    folder.chmod(0o700)


@contextlib.contextmanager
def _removed_on_failure(place: Path) -> Iterator[None]:
    """Begins with nothing at `place`, and leaves nothing there if the block fails."""
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
