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

from wsgi_ts.instance.instance import begin_process
from wsgi_ts.process import set_process_title
from wsgi_ts.rpc.server import credentials, serve

log = logging.getLogger("wsgi_ts.rpc")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.rpc", description=__doc__)
    parser.add_argument("--inference", required=True, help="host:port of the inference API")
    parser.add_argument("--management", required=True, help="host:port of the management API")
    options, instance = begin_process(parser, arguments)
    set_process_title("wsgi-ts: gRPC server")
    tls = None
    if options.tls_fd >= 0:
        # Opened anew: the descriptor's position is shared with other processes.
        tls = credentials(Path(f"/proc/self/fd/{options.tls_fd}").read_bytes())
        os.close(options.tls_fd)
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
