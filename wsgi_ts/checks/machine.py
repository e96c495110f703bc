"""What `wsgi-ts doctor` finds out about the machine; light, so that it can say which package is missing."""

from __future__ import annotations

import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from wsgi_ts import compiled_modules
from wsgi_ts.batcher.shm.machine import machine_problem
from wsgi_ts.cgroup import usable_cores
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import Config

_TORCH_FLOOR = (2, 6)
_LIBRARIES = ("gunicorn", "falcon", "hpack", "httptools", "protobuf", "posix-ipc", "numpy", "PyYAML", "setproctitle")
#: Descriptors of a web worker besides one for each request under way: segments, sockets, logs.
_SPARE_FILES = 256
_GPU_LIMIT_S = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Literal["OK", "WARN", "FAIL"]
    subject: str
    text: str

    def __str__(self) -> str:
        """The line as it is printed."""
        return f"{self.level:<4}  {self.subject:<18}  {self.text}"


def check_machine() -> Iterator[Finding]:
    """The processor, whose memory order the data path relies on."""
    problem = machine_problem()
    if problem is not None:
        yield Finding("FAIL", "processor", problem)
    else:
        yield Finding("OK", "processor", platform.machine())


def check_clock() -> Iterator[Finding]:
    """Whether Python's own waits with a limit (threads, locks, queues) follow the monotonic clock."""
    if sys.version_info < (3, 11) or not sysconfig.get_config_var("HAVE_SEM_CLOCKWAIT"):
        text = (
            "this Python's waits follow the wall clock: one that is set back delays metrics and management calls by as "
            "much; use Python 3.11 or newer that was built with glibc 2.30 or newer"
        )
        yield Finding("WARN", "clock", text)


def check_python() -> Iterator[Finding]:
    """Versions of Python and of the libraries that it takes; torch is looked up, not imported."""
    from importlib import metadata  # with the package for mails that it needs; the supervisor has this module, too

    yield Finding("OK", "Python", f"{platform.python_version()} ({sys.executable})")
    for package in ("torch", *_LIBRARIES):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("FAIL", package, f"not installed; run: {sys.executable} -m pip install {package}")
            continue
        if package == "torch" and _version(version) < _TORCH_FLOOR:
            yield Finding("WARN", package, f"{version}; loading weights safely needs 2.6 or newer")
        else:
            yield Finding("OK", package, version)


def check_compiled() -> Iterator[Finding]:
    """Whether requests run through compiled modules, which halves what one costs."""
    text = compiled_modules.describe()
    if compiled_modules.modules or compiled_modules.is_switched_off:
        yield Finding("OK", "data path", text)
    else:
        remedy = "install it again with a C compiler there (in a source tree: make install)"
        yield Finding("WARN", "data path", f"{text}; requests cost more CPU time than they need: {remedy}")


def check_open_files(config: Config) -> Iterator[Finding]:
    """The limit of open files against the connections that one web worker may hold.

    The hard limit counts: processes that hold connections raise the soft one.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.slots_per_worker + _SPARE_FILES
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if hard == resource.RLIM_INFINITY or hard >= needed:
        yield Finding("OK", "open files", f"limit {shown}, {needed} wanted by each web worker")
    else:
        remedy = f"set as root: ulimit -Hn {needed}"
        yield Finding("WARN", "open files", f"limit {shown}, {needed} wanted by each web worker; {remedy}")


def check_cores(config: Config) -> Iterator[Finding]:
    """Web workers against the cores that this process may use."""
    cores = usable_cores()
    text = f"{cores} for {config.web_workers} web workers and the model workers"
    if config.web_workers > 2 * cores:
        yield Finding("WARN", "cores", f"{text}; lower web_workers to {2 * cores} or less")
    else:
        yield Finding("OK", "cores", text)


def check_gpus(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The GPUs that nvidia-smi lists."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        if Path("/proc/driver/nvidia").exists():
            yield Finding("WARN", "GPUs", "an NVIDIA driver is loaded, but nvidia-smi is missing; install it")
        else:
            yield Finding("OK", "GPUs", "none; models run on the CPU")
        return
    try:
        query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("WARN", "GPUs", f"nvidia-smi failed ({error}); models run on the CPU until it works")
        return
    gpus = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    yield Finding("OK", "GPUs", f"{len(gpus)}: {'; '.join(gpus)}" if gpus else "none; models run on the CPU")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
