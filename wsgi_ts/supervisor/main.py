"""`python -m wsgi_ts.supervisor`: the process that starts, watches and stops all others of an instance."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from wsgi_ts.checks.start import StartError
from wsgi_ts.control.memory_file import read_memory_file
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.instance.listeners import BindError
from wsgi_ts.instance.run_directory import RunDirectoryError
from wsgi_ts.logs.text import safe_text
from wsgi_ts.process import PASSWORD_VARIABLE, die_with_parent, enable_fault_traces
from wsgi_ts.settings.config import Config, ConfigError
from wsgi_ts.supervisor.spare_processes import Spares
from wsgi_ts.supervisor.start import open_logs
from wsgi_ts.supervisor.supervisor import Supervisor

log = logging.getLogger("wsgi_ts.supervisor")

#: Two gunicorns, a batcher and the gRPC server are forked; further batchers, and what is started again, are not.
_SPARES = 4
#: What they run, and this process does not. grpc is not among it: it must not be forked.
_OF_SPARES = ("wsgi_ts.web.gunicorn_app", "wsgi_ts.web.worker", "wsgi_ts.batcher.main")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.supervisor", description=__doc__)
    add = parser.add_argument
    add("--config-fd", type=int, required=True, help="a file in memory with the configuration")
    add("--run-dir", type=Path, help="default: the one in the configuration")
    add("--guard-fd", type=int, default=-1, help="socket to the guard, which gives this and what follows")
    add("--guard-pid", type=int)
    add("--life", type=int, default=1, help="how many supervisors it has started")
    add("--watched", action="store_true", help="it wants to hear once a second that this one works")
    add("--trial", action="store_true", help="it starts the one before again if this one never serves")
    add("--last-end", default="", help="how the last one ended")
    add("--kept", type=_kept, action="append", default=[], help="what earlier ones had it keep: NAME=FD")
    return parser.parse_args(arguments)


def _kept(text: str) -> tuple[str, int]:
    name, _, fd = text.rpartition("=")
    return name, int(fd)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one instance; returns its exit code."""
    enable_fault_traces()
    options = _parse_arguments(arguments)
    die_with_parent(options.guard_pid)
    os.set_inheritable(options.config_fd, False)
    try:
        config = Config.from_json(read_memory_file(options.config_fd).decode())
    except (OSError, ConfigError) as error:
        print(f"the configuration as the launcher has written it: {error}", file=sys.stderr)
        return 1
    spares = Spares()
    # Before anything is made that they would hold, too. An engine listens nowhere; a password stays in this process.
    has_password = "keystore_pass" in config.origins or PASSWORD_VARIABLE in os.environ
    if config.embedded_in is None and not has_password:
        spares.fork(_SPARES, _OF_SPARES)
    guard = GuardLink(
        options.guard_fd,
        options.guard_pid,
        options.life,
        dict(options.kept),
        is_watched=options.watched,
        is_trial=options.trial,
    )
    try:
        log_plan, log_files = open_logs(config)
    except StartError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    try:
        if options.trial:
            log.info("Supervisor %d of this server, in the place of the one before", options.life)
        elif options.life > 1:
            log.warning("Supervisor %d of this server; the one before has ended: %s", options.life, options.last_end)
        return Supervisor(config, guard, options.run_dir or config.run_dir, log_plan, log_files, spares).run()
    except (StartError, RunDirectoryError, BindError) as error:
        message = config.located(str(error))
        log.error("%s", message)
        print(safe_text(message), file=sys.stderr, flush=True)
        return 1
