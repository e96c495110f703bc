"""`wsgi-ts doctor`: whether this machine can run a configuration, and what to do where it cannot.

Starts nothing and changes nothing. Each check yields lines OK, WARN (runs, but not as meant) or FAIL (it
will not start, or not serve).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wsgi_ts.address import Address
from wsgi_ts.config import Config, ConfigError, shm_needed
from wsgi_ts.config_sources import CommandLine, load_config, startup_archives
from wsgi_ts.pid_file import is_recorded, read_record, recorded_pid

_SHM = Path("/dev/shm")
_TORCH_FLOOR = (2, 6)
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


def run_doctor(command_line: CommandLine, environ: Mapping[str, str]) -> int:
    """Prints all findings.

    Args:
        command_line: the flags that `serve` would get.
        environ: the environment variables.

    Returns:
        The exit status: 1 if something FAILs, else 0.
    """
    failed = False
    for finding in examine(command_line, environ):
        print(finding, flush=True)
        failed = failed or finding.level == "FAIL"
    return 1 if failed else 0


def examine(command_line: CommandLine, environ: Mapping[str, str]) -> Iterator[Finding]:
    """All findings; without a usable configuration only those that do not depend on it."""
    yield from check_python()
    try:
        config = load_config(command_line, environ)
    except ConfigError as error:
        yield Finding("FAIL", "configuration", str(error))
        yield from check_gpus(environ)
        return
    source = f"read from {config.config_file}" if config.config_file else "no file, defaults"
    yield Finding("OK", "configuration", source)
    for warning in config.warnings:
        yield Finding("WARN", "configuration", warning)
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        check_shared_memory,
        check_open_files,
        check_cores,
        check_addresses,
        check_model_store,
        check_directories,
        check_leftovers,
    )
    for check in checks:
        yield from check(config)
    yield from check_gpus(environ)


def check_python() -> Iterator[Finding]:
    """Versions of Python and of the libraries that it takes; torch is looked up, not imported."""
    yield Finding("OK", "Python", f"{platform.python_version()} ({sys.executable})")
    for package in ("torch", "gunicorn", "falcon", "httptools", "grpcio", "protobuf", "posix-ipc", "numpy", "PyYAML"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", package, f"not installed; run: {sys.executable} -m pip install {package}")
            continue
        if package == "torch" and _version(version) < _TORCH_FLOOR:
            yield Finding("WARN", package, f"{version}; loading weights safely needs 2.6 or newer")
        else:
            yield Finding("OK", package, version)


def check_shared_memory(config: Config) -> Iterator[Finding]:
    """Room in /dev/shm for what the configuration takes at its start."""
    try:
        state = os.statvfs(_SHM)
    except OSError as error:
        yield Finding("FAIL", "/dev/shm", f"{error.strerror}; mount a tmpfs there")
        return
    if not os.access(_SHM, os.W_OK | os.X_OK):
        yield Finding("FAIL", "/dev/shm", "not writable; its mode should be 1777")
        return
    needed, free = shm_needed(config), state.f_bavail * state.f_frsize
    text = f"{_mib(free)} free, {_mib(needed)} needed"
    if free < needed:
        remedy = "start the container with a larger --shm-size, or lower web_workers or slots_per_worker"
        yield Finding("FAIL", "/dev/shm", f"{text}; {remedy}")
    elif free < needed + 4 * config.max_request_size:
        yield Finding("WARN", "/dev/shm", f"{text}: little is left for large requests; enlarge it (--shm-size)")
    else:
        yield Finding("OK", "/dev/shm", text)


def check_open_files(config: Config) -> Iterator[Finding]:
    """The limit of open files against the connections that one web worker may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.slots_per_worker + _SPARE_FILES
    unlimited = resource.RLIM_INFINITY
    shown = "unlimited" if soft == unlimited else str(soft)
    if soft == unlimited or soft >= needed:
        yield Finding("OK", "open files", f"limit {shown}, {needed} wanted by each web worker")
    else:
        remedy = f"ulimit -n {needed}" + ("" if hard in (unlimited,) or hard >= needed else ", as root")
        yield Finding("WARN", "open files", f"limit {shown}, {needed} wanted by each web worker; set: {remedy}")


def check_cores(config: Config) -> Iterator[Finding]:
    """Web workers against the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} for {config.web_workers} web workers and the model workers"
    if config.web_workers > 2 * cores:
        yield Finding("WARN", "cores", f"{text}; lower web_workers to {2 * cores} or less")
    else:
        yield Finding("OK", "cores", text)


def check_addresses(config: Config) -> Iterator[Finding]:
    """Whether each address can be listened on; an instance of ours that holds it is not an error."""
    addresses = {f"{api}_address": address for api, address in config.addresses.items()}
    if config.is_combined:
        del addresses["management_address"]
    addresses |= {f"grpc_{api}_port": address for api, address in config.grpc_addresses.items()}
    pid = recorded_pid(config.run_dir)
    running = pid is not None and is_recorded(pid, config.run_dir)
    for key, address in addresses.items():
        problem = _try_to_bind(address)
        if problem is None:
            yield Finding("OK", key, f"{address} is free")
        elif running:
            yield Finding("OK", key, f"{address} is in use; an instance is running (pid {pid})")
        else:
            yield Finding("FAIL", key, f"{address}: {problem}; stop what uses it, or change {key}")


def check_model_store(config: Config) -> Iterator[Finding]:
    """Whether the archives can be read, and the startup models are among them."""
    store = config.model_store
    if store is None:
        return
    try:
        archives = startup_archives(store)
    except ConfigError as error:
        yield Finding("FAIL", "model store", str(error))
        return
    unreadable = [name for name in archives if not os.access(store / name, os.R_OK)]
    if unreadable:
        yield Finding("FAIL", "model store", f"not readable: {', '.join(unreadable)}; check their permissions")
    else:
        yield Finding("OK", "model store", f"{store}: {len(archives)} archives")
    for _, url in config.load_models:
        if "://" not in url and not (store / os.path.basename(url)).exists() and not os.path.isdir(url):
            yield Finding("WARN", "load_models", f"{url} is not in {store}; this model will not be loaded")


def check_directories(config: Config) -> Iterator[Finding]:
    """Whether logs, temporary files and the run directory can be written."""
    for subject, directory, level in (
        ("logs", config.log_dir, "WARN"),
        ("temp", config.temp_dir, "FAIL"),
        ("run directory", config.run_dir, "FAIL"),
    ):
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            yield Finding("OK", subject, str(directory))
        else:
            text = f"{directory} cannot be written ({existing}); change its owner or choose another"
            yield Finding("WARN" if level == "WARN" else "FAIL", subject, text)


def check_leftovers(config: Config) -> Iterator[Finding]:
    """What a dead instance has left: the record of the run directory, and shared memory."""
    record = read_record(config.run_dir)
    pid, prefix = recorded_pid(config.run_dir), record.get("prefix")
    if pid is not None and is_recorded(pid, config.run_dir):
        yield Finding("OK", "left-overs", f"none; an instance is running (pid {pid})")
        return
    count = 0
    if isinstance(prefix, str) and prefix:
        count = sum(name.removeprefix("sem.").startswith(prefix) for name in _shm_names())
    if record:
        text = f"a dead instance (pid {pid}) left {count} shared-memory objects; the next start removes them"
        yield Finding("WARN", "left-overs", text)
    else:
        yield Finding("OK", "left-overs", "none")


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


def _try_to_bind(address: Address) -> str | None:
    """Why an address cannot be listened on, None where it can."""
    if address.scheme == "unix":
        return _try_unix_path(Path(address.path))
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            # Binding alone may succeed beside a listener that allows re-use.
            sock.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _try_unix_path(path: Path) -> str | None:
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"{path.parent} is not a directory that can be written"
    if not path.exists():
        return None
    if not path.is_socket():
        return "there is a file of this name"
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return None
        except OSError as error:
            return error.strerror or str(error)
    return "a server listens there"


def _shm_names() -> list[str]:
    try:
        return os.listdir(_SHM)
    except OSError:
        return []


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
