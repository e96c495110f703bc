"""`python -m wsgi_ts.rpc`: the process of the gRPC APIs, a child of the supervisor."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Sequence

from wsgi_ts.instance.instance import begin_process
from wsgi_ts.process import set_process_title
from wsgi_ts.rpc.serve import serve
from wsgi_ts.security.tls import listener_context

log = logging.getLogger("wsgi_ts.rpc")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.rpc", description=__doc__)
    for api in ("inference", "management"):
        parser.add_argument(f"--{api}-fd", type=int, required=True, help=f"the listening socket of the {api} API")
    options, instance = begin_process(parser, arguments)
    set_process_title("wsgi-ts: gRPC server")
    tls = None
    if options.tls_fd >= 0:
        tls = listener_context(options.tls_fd, instance.config, "h2")
        os.close(options.tls_fd)
    # What is there now stays, so the collector need not look after it again and again.
    gc.freeze()
    try:
        sockets = [socket.socket(fileno=fd) for fd in (options.inference_fd, options.management_fd)]
        asyncio.run(serve(instance, sockets, tls, options.ready_fd))
    except OSError as error:
        log.error("%s", error)
        # The supervisor keeps the last lines on stderr of a process that never worked.
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0
