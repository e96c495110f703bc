"""Steps of the supervisor's start that make what its processes need: logs, certificates, keys, board.

What a step makes is given back by the `stack` that it is told of, at the end of the instance or of a failed start.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from selectors import BaseSelector
from typing import Any

from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.checks.start import StartError
from wsgi_ts.control.memory_file import memory_file
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.guard.protocol import TOKENS
from wsgi_ts.instance.listeners import BoundListener
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.logs.notation import LogConfigError
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.rotation import LogRotation
from wsgi_ts.logs.setup import LogFiles, setup_logging
from wsgi_ts.logs.user_config import load_plan
from wsgi_ts.plugins.fetch import Fetchers
from wsgi_ts.plugins.found import Found, found_in
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.plugins.snapshot import Store
from wsgi_ts.security.tls import unheard_client_ca
from wsgi_ts.security.tokens import KeyFileError, KeyRing
from wsgi_ts.settings.config import Config
from wsgi_ts.tracing.post import Inlet
from wsgi_ts.tracing.store import TraceStore

log = logging.getLogger(__name__)

#: First segments of the paths of predictions.
PREDICTION_ROOTS = frozenset({"predictions", "explanations", "invocations", "models", "v1", "v2"})


def open_logs(config: Config) -> tuple[LogPlan, LogFiles]:
    """Begins to log as the configuration says, first of all what the configuration itself is warned of.

    Raises:
        StartError: the log configuration makes no sense.
    """
    try:
        plan = load_plan(
            config.log_dir,
            config.metrics_dir,
            config.log_config,
            os.environ,
            asynchronous=config.async_logging,
            log_format=config.log_format,
        )
        files = setup_logging(plan)
    except (LogConfigError, ValueError) as error:
        # Of dictConfig's errors the outer one names the handler and the inner one says why.
        raise StartError(f"{error}: {error.__cause__}" if error.__cause__ else str(error)) from error
    for warning in config.warnings:
        log.info("Configuration: %s", warning)
    if plan.notes:
        log.warning("%s: left out, has no counterpart here: %s", config.log_config, ", ".join(plan.notes))
    return plan, files


def start_log_rotation(files: LogFiles, reopen: Callable[[], None], stack: ExitStack) -> None:
    """Rotates the log files from now on.

    `reopen` has every process open its files again; it is called on the rotation's thread, and returns at once.
    """
    began_at = {file.path: file.began_at for file in files.files}
    rotation = LogRotation(files.rotations, began_at, reopen)
    rotation.start()
    stack.callback(rotation.stop)


def start_traces(store: TraceStore, path: Path, selector: BaseSelector, stack: ExitStack) -> None:
    """Takes records of requests from the socket at `path` now on; without them the server serves all the same."""
    try:
        inlet = Inlet(path, selector, store.add)
    except OSError as error:
        log.warning("No traces are kept: %s", error)
        return
    stack.callback(inlet.close)


def open_certificates(config: Config, stack: ExitStack) -> int:
    """Reads and checks what https listeners and gRPC over TLS need, into memory that their processes inherit.

    Returns the descriptor of that memory; -1 where there are no such listeners.

    Raises:
        StartError: it cannot be read, or does not fit together.
    """
    if fault := unheard_client_ca(config):
        raise StartError(fault)
    if not config.serves_tls:
        return -1
    # Only then: cryptography takes a while to load.
    from wsgi_ts.security.certificates import CertificateError, load_material

    try:
        fd = memory_file("tls", load_material(config).to_pem())
    except CertificateError as error:
        raise StartError(str(error)) from error
    stack.callback(os.close, fd)
    return fd


def make_keys(
    config: Config, publish: Callable[[dict[str, Any]], None], guard: GuardLink, stack: ExitStack
) -> KeyRing | None:
    """Makes the tokens and the file that clients take them from; None where requests need no tokens.

    The guard keeps them for the supervisor after this one, so that clients need no new ones. `publish`: see `KeyRing`.

    Raises:
        StartError: the file cannot be written.
    """
    if not config.token_authorization:
        return None
    keys = KeyRing(Path.cwd(), config.token_expiration_min, publish, lambda kept: guard.keep_json(TOKENS, kept))
    stack.callback(keys.remove)
    try:
        keys.create(guard.kept_json(TOKENS))
    except KeyFileError as error:
        raise StartError(str(error)) from error
    return keys


def make_board(prefix: str, batchers: int, stack: ExitStack) -> Board:
    """Makes the board and the batchers' doorbells, whose names go with the run directory, or raises StartError."""
    try:
        board = Board.create(prefix, batchers)
    except SharedMemoryFull as error:
        raise StartError(str(error.strerror)) from error
    stack.callback(board.close)
    for index in range(batchers):
        Doorbell.create(batcher_bell_name(prefix, index))
    return board


def write_for_children(config: Config, log_plan: LogPlan, directory: RunDirectory) -> None:
    """Writes configuration and log plan for the children, without the supervisor's own, or raises StartError."""
    try:
        log_plan.write(directory.log_plan)
        directory.config.touch(0o600)
        directory.config.write_text(dataclasses.replace(config, keystore_pass="").to_json())
    except OSError as error:
        raise StartError(f"run directory {directory.path}: {error}; make room, or set another --run-dir") from error


def say_plugins(config: Config) -> None:
    """Logs which plugins are loaded, and what the server leaves out because of them."""
    found = [Found(**row) for row in config.found_plugins]
    usable = [each for each in found if not each.error]
    for each in usable:
        if each.group == "endpoints":
            log.info("Loading plugin for endpoint %s", each.path)
        else:
            log.info("Loading plugin %s of the group %s", each.name, each.group)
    taken = {each.path for each in usable if each.type == "inference"} & PREDICTION_ROOTS
    for path in sorted(taken):
        log.info("Requests under /%s go to a plugin: they have no direct answers", path)
    if config.middleware_all and config.middleware and config.direct_answers:
        log.info("middleware_all=true: predictions pass the middleware, so direct_answers is off")


def snapshot_store(config: Config, report: PluginReport) -> Store | None:
    """What keeps snapshots in place of files; None where no plugin does."""
    found = found_in(config.found_plugins, "snapshot")
    if not found:
        return None
    log.info(" Loading snapshot serializer plugin...")
    return Store(config, found[0], report)


def fetchers(config: Config, report: PluginReport) -> Fetchers | None:
    """What fetches archives from URLs of other schemes; None where no plugin does."""
    return Fetchers(config, report) if found_in(config.found_plugins, "fetch") else None


def say_started(listeners: Iterable[BoundListener], keys: KeyRing | None) -> None:
    """Logs where the server listens and who may ask there: everybody where there are no keys."""
    for listener in listeners:
        log.info("%s API listens on %s", " and ".join(listener.kinds).capitalize(), listener.address)
        if not listener.address.is_local and keys is None:
            log.warning(
                "disable_token_authorization=true: %s answers everybody who can reach it%s",
                listener.address,
                "; who manages models runs code here" if "management" in listener.kinds else "",
            )
    if keys is not None:
        log.info('Token authorization is on: requests need "Authorization: Bearer TOKEN" with a token of %s', keys.path)
    log.info("Model server started.")
