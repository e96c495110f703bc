"""What the processes of one running instance have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.settings.config import Config


@dataclass(frozen=True)
class Instance:
    """What a process that serves an API has to know of the instance it belongs to.

    Attributes:
        config: the configuration.
        run_dir: the run directory, with the control socket.
        prefix: of the instance's shared-memory names.
        log_files: the open log files of this process.
    """

    config: Config
    run_dir: Path
    prefix: str
    log_files: LogFiles
