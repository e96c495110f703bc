"""What `wsgi-ts doctor` finds out about a configuration: what the start checks, by the start's own functions."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from logging.handlers import BufferingHandler

from wsgi_ts.batcher.shm.shared_memory import SHM_DIRECTORY, free_bytes
from wsgi_ts.checks.machine import Finding
from wsgi_ts.checks.start import (
    StartError,
    check_addressable,
    check_exporter,
    check_interpreter,
    check_model_store,
    check_run_directory,
)
from wsgi_ts.gpu.devices import gpu_count
from wsgi_ts.instance.listeners import bind_problem, grpc_sockets, rest_sockets
from wsgi_ts.instance.record import Record
from wsgi_ts.instance.shared_memory import start_bytes
from wsgi_ts.metrics.reported import PROMETHEUS_MODE
from wsgi_ts.metrics.specification import MetricsConfigError, load_specification
from wsgi_ts.models.recorded import SnapshotError, recorded_models
from wsgi_ts.plugins.discovery import jars
from wsgi_ts.plugins.probe import JAR, examine, stops_the_start
from wsgi_ts.security.tls import unheard_client_ca
from wsgi_ts.settings.config import Config, ConfigError
from wsgi_ts.settings.stores import startup_archives

#: How long a module of `preload_modules` may take to be imported, in seconds.
_IMPORT_LIMIT_S = 120


def check_shared_memory(config: Config) -> Iterator[Finding]:
    """Room in /dev/shm for what the configuration takes at its start."""
    try:
        free = free_bytes()
    except OSError as error:
        yield Finding("FAIL", "/dev/shm", f"{error.strerror}; mount a tmpfs there")
        return
    if not os.access(SHM_DIRECTORY, os.W_OK | os.X_OK):
        yield Finding("FAIL", "/dev/shm", "not writable; its mode should be 1777")
        return
    batchers = gpu_count(config.number_of_gpu) + 1
    try:
        check_addressable(config, batchers)
    except StartError as error:
        yield Finding("FAIL", "/dev/shm", str(error))
        return
    needed = start_bytes(config, batchers)
    text = f"{_mib(free)} free, {_mib(needed)} needed"
    if free < needed:
        remedy = "start the container with a larger --shm-size, or lower web_workers or slots_per_worker"
        yield Finding("FAIL", "/dev/shm", f"{text}; {remedy}")
    elif free < needed + max(config.shm_warm_bytes, 4 * config.max_request_size):
        yield Finding("WARN", "/dev/shm", f"{text}: little is left for large requests; enlarge it (--shm-size)")
    else:
        yield Finding("OK", "/dev/shm", text)


def check_addresses(config: Config) -> Iterator[Finding]:
    """Whether each address can be listened on; an instance of ours that holds it is not an error."""
    record = Record.find(config.run_dir)
    for each in (*rest_sockets(config), *grpc_sockets(config)):
        key, address, problem = each.port_key, each.address, bind_problem(each)
        if problem is None:
            yield Finding("OK", key, f"{address} is free")
        elif record is not None and record.is_running:
            yield Finding("OK", key, f"{address} is in use; an instance is running (pid {record.pid})")
        else:
            yield Finding("FAIL", key, f"{address}: {problem}")


def check_archives(config: Config) -> Iterator[Finding]:
    """Whether the archives can be read, and the startup models are among them."""
    store = config.model_store
    if store is None:
        return
    try:
        check_model_store(config)
        archives = startup_archives(store)
    except (StartError, ConfigError) as error:
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
    workflows = config.workflow_store or store
    for _, url in config.load_workflows:
        if "://" not in url and not (workflows / os.path.basename(url)).exists():
            yield Finding("WARN", "load_workflows", f"{url} is not in {workflows}; this workflow will not be loaded")


def check_certificates(config: Config) -> Iterator[Finding]:
    """Whether key and certificate can be served, where anything speaks TLS."""
    if fault := unheard_client_ca(config):
        yield Finding("FAIL", "certificate", fault)
    if not config.serves_tls:
        return
    # Only then: cryptography takes a while to load.
    from wsgi_ts.security.certificates import CertificateError, load_material

    with _warnings() as warnings:
        try:
            load_material(config)
        except CertificateError as error:
            yield Finding("FAIL", "certificate", str(error))
        else:
            yield Finding("OK", "certificate", "key and certificate can be served")
    for record in warnings:
        yield Finding("WARN", "certificate", record.getMessage())


def check_models_interpreter(config: Config) -> Iterator[Finding]:
    """Whether the interpreter that the key `python` names can run model workers."""
    try:
        check_interpreter(config)
    except StartError as error:
        yield Finding("FAIL", "model workers", str(error))
    else:
        yield Finding("OK", "model workers", config.python)


def check_collector(config: Config) -> Iterator[Finding]:
    """Whether spans can be sent, where a collector is configured."""
    try:
        check_exporter(config)
    except StartError as error:
        yield Finding("FAIL", "otlp_endpoint", str(error))
    else:
        if config.otlp_endpoint:
            yield Finding("OK", "otlp_endpoint", config.otlp_endpoint)


def check_preload_modules(config: Config) -> Iterator[Finding]:
    """Whether the modules that are to be imported once for all workers can be imported."""
    for name in config.preload_modules:
        safe = ["-P"] if sys.version_info >= (3, 11) else []
        command = [sys.executable, *safe, "-c", f"import {name}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            yield Finding("FAIL", "preload_modules", f"{name} cannot be imported ({error}); take it out of the key")
            continue
        if done.returncode == 0:
            yield Finding("OK", "preload_modules", f"{name} can be imported")
            continue
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        text = f"{name} cannot be imported ({lines[-1]}); correct the name, install it, or take it out of the key"
        yield Finding("FAIL", "preload_modules", text)


def check_snapshot(config: Config) -> Iterator[Finding]:
    """Whether the models of the snapshot that the configuration is read from are there."""
    try:
        recorded_models(config)
    except SnapshotError as error:
        yield Finding("FAIL", "snapshot", str(error))


def check_metrics_config(config: Config) -> Iterator[Finding]:
    """Whether metrics.yaml can be used; a server runs without metrics where it cannot."""
    try:
        load_specification(config.metrics_config, for_prometheus=config.metrics_mode == PROMETHEUS_MODE)
    except MetricsConfigError as error:
        yield Finding("WARN", "metrics_config", f"{error}; no metrics are recorded")


def check_directories(config: Config) -> Iterator[Finding]:
    """Whether logs, temporary files and the run directory can be written."""
    try:
        check_run_directory(config.run_dir)
    except StartError as error:
        yield Finding("FAIL", "run directory", str(error))
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
    record = Record.find(config.run_dir)
    if record is None:
        yield Finding("OK", "left-overs", "none")
    elif record.is_running:
        yield Finding("OK", "left-overs", f"none; an instance is running (pid {record.pid})")
    else:
        count = (
            sum(name.removeprefix("sem.").startswith(record.prefix) for name in _shm_names()) if record.prefix else 0
        )
        text = f"a dead instance (pid {record.pid}) left {count} shared-memory objects; the next start removes them"
        yield Finding("WARN", "left-overs", text)


@contextlib.contextmanager
def _warnings() -> Iterator[list[logging.LogRecord]]:
    """What the start would log as warnings."""
    logger, collector = logging.getLogger("wsgi_ts"), BufferingHandler(sys.maxsize)
    collector.setLevel(logging.WARNING)
    passes_on = logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield collector.buffer
    finally:
        logger.removeHandler(collector)
        logger.propagate = passes_on


def _shm_names() -> list[str]:
    try:
        return os.listdir(SHM_DIRECTORY)
    except OSError:
        return []


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


#: All of them, in the order of the report.
def check_plugins(config: Config) -> Iterator[Finding]:
    """Whether the plugins can be loaded."""
    for jar in jars(config.plugins_path):
        yield Finding("WARN", "plugins", JAR.format(jar=jar))
    try:
        found = examine(config)
    except ConfigError as error:
        yield Finding("FAIL", "plugins", str(error))
        return
    for each in found:
        name = f"plugin {each.name or each.target}"
        if not each.error:
            yield Finding("OK", name, f"{each.group}, from {each.origin}")
        else:
            stops = config.plugins_strict or stops_the_start(each)
            yield Finding("FAIL" if stops else "WARN", name, f"{each.error} ({each.origin})")


CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    check_shared_memory,
    check_addresses,
    check_archives,
    check_certificates,
    check_models_interpreter,
    check_collector,
    check_preload_modules,
    check_snapshot,
    check_metrics_config,
    check_directories,
    check_plugins,
    check_leftovers,
)
