"""What the supervisor checks before it starts anything."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import wsgi_ts
from wsgi_ts.batcher.shm.machine import machine_problem
from wsgi_ts.batcher.shm.shared_memory import free_bytes
from wsgi_ts.checks.handler_source import is_installed
from wsgi_ts.instance.listeners import UNIX_PATH_BYTES
from wsgi_ts.instance.shared_memory import address_bytes, start_bytes
from wsgi_ts.models.environment import interpreter
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import DEFAULT_ALLOWED_URLS, Config

log = logging.getLogger(__name__)

#: How long another interpreter may take to import what a model worker needs, in seconds.
_INTERPRETER_LIMIT_S = 120.0
#: Half of what a process can address: segments of web workers that have died are there for a moment longer.
_MOST_ADDRESSES = 2**46
_CAN_RUN_WORKERS = (
    "import sys; sys.path.append(sys.argv[1]); import setproctitle, wsgi_ts.batcher.worker.main; "
    "print(wsgi_ts.__version__)"
)


class StartError(Exception):
    """The instance cannot start; the message says why and what to do, on one line."""


def check_machine() -> None:
    """Raises StartError where the data path is not safe on this processor."""
    problem = machine_problem()
    if problem is not None:
        raise StartError(problem)


def check_configuration(config: Config, batchers: int) -> None:
    """Raises StartError where this machine cannot run a configuration; warns of what it may not be meant to allow."""
    check_shared_memory(config, batchers)
    check_model_store(config)
    check_interpreter(config)
    check_exporter(config)
    if config.enable_model_api and config.allowed_urls == DEFAULT_ALLOWED_URLS:
        log.warning(
            "Models can be registered from any URL: allowed_urls is not set. Set it to the addresses that you trust, "
            "for example https://models\\.example\\.org/.*"
        )


def check_exporter(config: Config) -> None:
    """Raises StartError where a collector is configured and spans cannot be sent to it."""
    if not config.otlp_endpoint:
        return
    scheme, _, host = config.otlp_endpoint.partition("://")
    if scheme not in ("http", "https") or not host:
        raise StartError(
            config.located(
                f"otlp_endpoint={config.otlp_endpoint} is not the URL of a collector that takes OTLP over HTTP; "
                "write for example http://127.0.0.1:4318"
            )
        )
    if not all(map(is_installed, ("opentelemetry.proto", "opentelemetry.sdk", "requests"))):
        raise StartError(
            config.located("otlp_endpoint is set, but OpenTelemetry is not installed: pip install 'wsgi-ts[trace]'")
        )


def check_addressable(config: Config, batchers: int) -> None:
    """Raises StartError where a batcher, which alone would find out, cannot map the segments of all web workers."""
    addresses = address_bytes(config, batchers)
    if addresses > _MOST_ADDRESSES:
        raise StartError(
            f"slots_per_worker={config.slots_per_worker} for {config.web_workers} web workers with "
            f"max_request_size={config.max_request_size} and max_response_size={config.max_response_size} take "
            f"{addresses >> 40} TiB of addresses, of which a process has {_MOST_ADDRESSES >> 40}; set one of them lower"
        )


def check_shared_memory(config: Config, batchers: int) -> None:
    """Raises StartError where what every web worker and the gRPC server reserve does not fit."""
    check_addressable(config, batchers)
    needed = start_bytes(config, batchers)
    try:
        available = free_bytes()
    except OSError as error:
        raise StartError(f"/dev/shm: {error.strerror}; mount a tmpfs there") from error
    if needed > available:
        raise StartError(
            f"/dev/shm is too small: need {needed} bytes, have {available} in /dev/shm: make it larger (docker: "
            f"--shm-size), or set web_workers (now {config.web_workers}) or slots_per_worker (now "
            f"{config.slots_per_worker}) lower"
        )


def check_model_store(config: Config) -> None:
    """Raises StartError where the archives cannot be looked for."""
    for key in ("model_store", "workflow_store"):
        directory = getattr(config, key)
        if directory is not None and not os.access(directory, os.R_OK | os.X_OK):
            raise StartError(f"{key} {directory}: cannot be read; check its permissions, or set another")


def check_run_directory(path: Path) -> None:
    """Raises StartError where the path is too long for the control socket."""
    longest = UNIX_PATH_BYTES - len(f"/{RunFiles(path).control_socket.name}")
    if len(os.fsencode(path)) > longest:
        raise StartError(
            f"run directory {path}: its path is too long for a Unix socket in it (at most {longest} bytes); set "
            "another --run-dir or a shorter TEMP"
        )


def check_interpreter(config: Config) -> None:
    """Raises StartError where the interpreter that the key `python` names cannot run model workers."""
    python = interpreter(config)
    if python == sys.executable:
        return
    home = str(Path(wsgi_ts.__file__).parent.parent)
    try:
        asked = subprocess.run(
            [python, "-c", _CAN_RUN_WORKERS, home],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_INTERPRETER_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartError(f"python={config.python}: cannot be run: {error}; correct the key or remove it") from error
    lines = (asked.stdout if asked.returncode == 0 else asked.stderr).decode(errors="replace").strip().splitlines()
    found = lines[-1] if lines else f"exit code {asked.returncode}"
    if asked.returncode != 0:
        raise StartError(
            f"python={config.python}: cannot run model workers: {found}; install wsgi-ts {wsgi_ts.__version__} there, "
            "or remove the key"
        )
    if found != wsgi_ts.__version__:
        raise StartError(
            f"python={config.python}: has wsgi-ts {found}, the server is {wsgi_ts.__version__}; install the same there"
        )
