"""`python -m wsgi_ts.batcher`: a batcher, started by the supervisor."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from wsgi_ts.batcher.batcher import Batcher
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.setup import setup_logging
from wsgi_ts.process import die_with_parent, set_process_title
from wsgi_ts.run_files import RunFiles


def main() -> int:
    """Entry of `python -m wsgi_ts.batcher`."""
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.batcher")
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--segments", default="")
    parser.add_argument("--threads-budget", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    die_with_parent()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # the supervisor alone decides when a batcher ends
    log_files = setup_logging(LogPlan.read(RunFiles(options.run_dir).log_plan))
    set_process_title(f"wsgi-ts: batcher {options.index} {options.device}")
    return Batcher(options, log_files).run()
