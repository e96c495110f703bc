"""Logging set up as a process of the server does it, and put back as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsgi_ts.logs.output import write_in_background
from wsgi_ts.logs.plan import LogPlan, default_plan
from wsgi_ts.logs.setup import LogFiles, detach_logging, setup_logging


@contextmanager
def logging_to(folder: Path, plan: LogPlan | None = None) -> Iterator[LogFiles]:
    """Logs into a folder for the length of the block.

    Args:
        folder: for all five files.
        plan: instead of the built-in one.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    files = setup_logging(plan or default_plan(folder, folder))
    try:
        yield files
    finally:
        write_in_background(False)
        files.close()
        detach_logging()
        root.handlers[:] = handlers
        root.setLevel(level)
