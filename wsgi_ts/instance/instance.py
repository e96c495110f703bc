"""What the processes of one running instance have in common, and how those that serve an API begin."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.setup import LogFiles, setup_logging
from wsgi_ts.process import die_with_parent, enable_fault_traces, raise_open_files_limit
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config


@dataclass(frozen=True)
class Instance:
    """What a process that serves an API has to know of the instance it belongs to.

    Attributes:
        run_dir: the run directory, with the control socket.
        prefix: of the instance's shared-memory names.
        log_files: the open log files of this process.
    """

    config: Config
    run_dir: Path
    prefix: str
    log_files: LogFiles


def begin_process(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, Instance]:
    """Begins a process that serves an API: reads its command line and the configuration, logs, ends with its parent.

    `parser` knows its own flags; those that the supervisor gives to all such processes are added.
    """
    die_with_parent()
    enable_fault_traces()
    raise_open_files_limit()
    add = parser.add_argument
    add("--config-json", type=Path, required=True)
    add("--run-dir", type=Path, required=True)
    add("--prefix", required=True)
    add("--ready-fd", type=int, default=-1, help="gets a byte for each process that has booted, or each second")
    add("--tls-fd", type=int, default=-1, help="key and certificates as PEM; read once, then closed")
    options = parser.parse_args(arguments)
    config = Config.from_json(options.config_json.read_text())
    log_files = setup_logging(LogPlan.read(RunFiles(options.run_dir).log_plan))
    if options.ready_fd >= 0:
        os.set_inheritable(options.ready_fd, False)
    return options, Instance(config, options.run_dir, options.prefix, log_files)
