"""`python -m wsgi_ts.rpc`: the process of the gRPC APIs, a child of the supervisor."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from wsgi_ts.instance.instance import Instance
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.setup import setup_logging
from wsgi_ts.process import die_with_parent, enable_fault_traces, raise_open_files_limit, set_process_title
from wsgi_ts.rpc.server import credentials, serve
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config

log = logging.getLogger("wsgi_ts.rpc")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.rpc", description=__doc__)
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--inference", required=True, help="host:port of the inference API")
    parser.add_argument("--management", required=True, help="host:port of the management API")
    parser.add_argument("--ready-fd", type=int, default=-1, help="gets a byte a second while it serves")
    parser.add_argument("--tls-fd", type=int, default=-1, help="key and certificates as PEM; read once, then closed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; returns the exit code."""
    die_with_parent()
    enable_fault_traces()
    raise_open_files_limit()
    options = _parse_arguments(arguments)
    config = Config.from_json(options.config_json.read_text())
    log_files = setup_logging(LogPlan.read(RunFiles(options.run_dir).log_plan))
    set_process_title("wsgi-ts: gRPC server")
    if options.ready_fd >= 0:
        os.set_inheritable(options.ready_fd, False)
    tls = None
    if options.tls_fd >= 0:
        # Opened anew: the descriptor's position is shared with other processes.
        tls = credentials(Path(f"/proc/self/fd/{options.tls_fd}").read_bytes())
        os.close(options.tls_fd)
    instance = Instance(config, options.run_dir, options.prefix, log_files)
    # What is there now stays, so the collector need not look after it again and again.
    gc.freeze()
    try:
        asyncio.run(serve(instance, (options.inference, options.management), tls, options.ready_fd))
    except OSError as error:
        log.error("%s", error)
        # The supervisor keeps the last lines on stderr of a process that never worked.
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
