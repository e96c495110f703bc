"""The start of a batcher's two worker templates, and what is imported in each.

The worker template (`python -m wsgi_ts.batcher.template`, a child of its batcher) imports what every model worker
needs, which takes a moment, and can start workers. Before that it forks the warm template, which imports
`preload_modules` (torch) besides: seconds, in which workers whose handlers need none of them are started already. Each
is the parent of the workers that are forked from it, has a channel of its own to the batcher, and ends with the other.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from wsgi_ts import messages
from wsgi_ts.batcher.spawn.process import load_entry
from wsgi_ts.batcher.template.imports import import_beforehand, import_numpy
from wsgi_ts.batcher.template.template import Template
from wsgi_ts.control.channel import Channel
from wsgi_ts.logs.output import flush_outputs
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.setup import setup_logging
from wsgi_ts.metrics.reported import ModelMetrics
from wsgi_ts.process import die_with_parent, set_process_title

DEFAULT_ENTRY = "wsgi_ts.batcher.worker.main:run"
#: What every worker needs: loaded once here, shared by all forks.
_FOR_ALL = "wsgi_ts.handlers.serving.service"
#: What most handlers that use torch import besides.
_TORCH_HANDLERS = "wsgi_ts.handlers.bundled.base"
_PR_SET_CHILD_SUBREAPER = 36


def main() -> NoReturn:
    """Entry of the worker template."""
    # The channel tells if the batcher is gone already.
    die_with_parent(os.getppid())
    options = _parse_arguments()
    logs = setup_logging(LogPlan.read(options.log_plan))
    set_process_title(f"wsgi-ts: worker template {options.device}")
    import_beforehand(_FOR_ALL)
    entry = load_entry(options.entry)
    metrics = ModelMetrics.load(options.metrics_config, options.metrics_mode, options.metrics_auto_detect)
    fd, warm_pid = options.fd, None
    first: messages.FromTemplate = messages.TemplateReady()
    if options.warm_fd is not None:
        # Now that this process has one thread, and nothing of any worker.
        gc.collect()
        gc.freeze()
        parent, warm_pid = os.getpid(), os.fork()
        first = messages.TemplateStarted()
        if warm_pid == 0:
            die_with_parent(parent)
            fd, warm_pid, first = options.warm_fd, None, _warm_up(options)
        os.close(options.fd if fd == options.warm_fd else options.warm_fd)
    # Orphans of handlers come to us, so that they can be found.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()
    Template(Channel(socket.socket(fileno=fd)), logs, metrics, entry, first, warm_pid).run()
    # The interpreter would take half a second to give torch back, and the stop of the server waits for it.
    flush_outputs()
    os._exit(0)


def _warm_up(options: argparse.Namespace) -> messages.TemplateReady:
    """Makes this process the warm template; returns what the batcher is told of it.

    Without torch, which is the default, the server still runs handlers that do not use it.
    """
    set_process_title(f"wsgi-ts: warm worker template {options.device}")
    if options.preload:
        import_numpy()
    missing = {name: reason for name in options.preload if (reason := import_beforehand(name)) is not None}
    missing.pop("torch", None)
    if "torch" in sys.modules:
        import_beforehand(_TORCH_HANDLERS)
    return messages.TemplateReady(missing)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.batcher.template")
    parser.add_argument("--fd", type=int, required=True, help="socket to the batcher")
    parser.add_argument("--warm-fd", type=int, help="the warm template's, which there is only with this")
    parser.add_argument("--log-plan", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="for the process title")
    parser.add_argument("--entry", default=DEFAULT_ENTRY, help="module:function that a forked worker runs")
    parser.add_argument("--preload", action="append", default=[], help="a module to import; may be repeated")
    parser.add_argument("--metrics-mode", default="log")
    parser.add_argument("--metrics-config", type=Path, help="metrics.yaml; the built-in one if not given")
    parser.add_argument("--metrics-auto-detect", action="store_true")
    return parser.parse_args()
