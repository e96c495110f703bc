"""`gunicorn_config`: a user's file with hooks of gunicorn. What the server sets itself is refused, with a line."""

from __future__ import annotations

import logging
import runpy
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from gunicorn.config import KNOWN_SETTINGS

from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.report import FAILED, LOADED, PluginReport
from wsgi_ts.plugins.threads import LOAD_LIMIT_S, Late, within
from wsgi_ts.web.middleware_limits import MainThreadLimit

log = logging.getLogger("wsgi_ts.plugins")

#: Hooks that gunicorn calls here; those of single requests and of TLS are not among them.
HOOKS = (
    *("on_starting", "on_reload", "when_ready", "pre_fork", "post_fork", "post_worker_init", "worker_int"),
    *("worker_abort", "pre_exec", "child_exit", "worker_exit", "nworkers_changed", "on_exit"),
)
#: How long a hook may take, in seconds.
HOOK_LIMIT_S = 10.0
#: Settings that may be changed.
_FREE = ("raw_env", "umask", "worker_tmp_dir", "max_requests_jitter")


def read_gunicorn_config(path: Path, report: PluginReport) -> dict[str, Any]:
    """The hooks and settings of the file that count; of the others a line in the log says so.

    The report gets what goes wrong, also later in a hook.
    """
    found = Found("gunicorn_config", "gunicorn", str(path), "key gunicorn_config")
    try:
        said = within(LOAD_LIMIT_S, lambda: runpy.run_path(str(path)))
    except Exception as error:
        report.failed(found, error, state=FAILED, instead="the server starts without it")
        return {}
    report.note(found, LOADED)
    settings = {setting.name: setting for setting in KNOWN_SETTINGS}
    values: dict[str, Any] = {}
    for name in said.keys() & settings.keys():
        if name not in (*HOOKS, *_FREE):
            log.warning("gunicorn_config: %s in %s has no effect: the server sets it itself", name, path)
            continue
        try:
            settings[name]().set(said[name])
        except (TypeError, ValueError) as error:
            report.failed(found, f"{name}: {error}", instead="gunicorn goes on without it")
            continue
        values[name] = _guarded(found, name, said[name], report) if name in HOOKS else said[name]
    return values


def both(first: Callable[..., Any], second: Callable[..., Any] | None) -> Callable[..., Any]:
    """Calls one hook after the other."""
    if second is None:
        return first

    @wraps(first)  # gunicorn counts a hook's arguments
    def call(*arguments: Any) -> None:
        first(*arguments)
        second(*arguments)

    return call


def _guarded(found: Found, name: str, hook: Callable[..., Any], report: PluginReport) -> Callable[..., Any]:
    @wraps(hook)
    def call(*arguments: Any) -> None:
        # On this thread, since a hook may set handlers of signals. What had SIGALRM before has it again afterwards.
        limit = MainThreadLimit()
        try:
            limit.begin(HOOK_LIMIT_S)
            try:
                hook(*arguments)
            finally:
                limit.end()
        except Late:
            limit.end()  # where it came between the end of the hook and that of its time
            late = f"{name} has not ended within {HOOK_LIMIT_S:g} s"
            report.failed(found, late, instead=f"gunicorn goes on without its {name}")
        except BaseException as error:
            report.failed(found, error, instead=f"gunicorn goes on without its {name}")
        finally:
            limit.close()

    return call
