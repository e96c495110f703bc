"""Calls to the app that may block, on threads beside the web worker's loop.

A call that waits for models to load or to end must not stand in the way of one that is answered at once: each kind has
threads of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wsgi_ts.web.app import AppResponse, WSGIApp, call_app
from wsgi_ts.web.connection import Connection

#: For calls that are answered at once, and for those that wait.
QUICK_THREADS = 8
WAITING_THREADS = 32


class CallThreads:
    """The threads, and what they have answered.

    Args:
        wake: wakes the loop; called on a thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._pools: dict[bool, ThreadPoolExecutor] = {}
        self._finished: deque[tuple[Connection, AppResponse | Exception]] = deque()

    def submit(self, connection: Connection, app: WSGIApp, environ: dict[str, Any], *, waits: bool) -> None:
        """Has a thread call the app.

        Args:
            connection: who is answered.
            app: the app.
            environ: its argument.
            waits: it may take as long as models take to load.
        """
        pool = self._pools.get(waits)
        if pool is None:
            threads, name = (WAITING_THREADS, "management-waiting") if waits else (QUICK_THREADS, "management")
            pool = self._pools[waits] = ThreadPoolExecutor(threads, thread_name_prefix=name)
        pool.submit(self._call, connection, app, environ)

    def take(self) -> tuple[Connection, AppResponse | Exception] | None:
        """The next answer, or what was raised in its place; None when there is none."""
        return self._finished.popleft() if self._finished else None

    def _call(self, connection: Connection, app: WSGIApp, environ: dict[str, Any]) -> None:
        result: AppResponse | Exception
        try:
            result = call_app(app, environ)
        except Exception as error:  # the loop logs it and answers
            result = error
        self._finished.append((connection, result))
        self._wake()
