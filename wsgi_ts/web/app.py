"""The WSGI side of a web worker: what the app gets, its answer as one object, and threads for calls that may block."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.errors import ServerError
from wsgi_ts.plugins.auth import Decision, Gate
from wsgi_ts.plugins.threads import DaemonThreads, ThreadCall, as_exception
from wsgi_ts.rest.plugin_endpoints import WSGIApp
from wsgi_ts.rest.responses import REQUEST_ID_KEY
from wsgi_ts.web.connection import Connection, Phase
from wsgi_ts.web.plugins import PluginEndpoint

#: For calls that are answered at once, and for those that wait.
QUICK_THREADS = 8
WAITING_THREADS = 32


def environ_of(connection: Connection) -> dict[str, Any]:
    """Returns the WSGI variables that every kind of request has."""
    environ = connection.endpoint.environ.copy()
    if connection.head is not None:
        environ.update(connection.head.environ)
    environ[REQUEST_ID_KEY] = connection.request_id
    environ["REMOTE_ADDR"] = connection.peer
    return environ


def call_app(app: WSGIApp, environ: dict[str, Any]) -> Answer:
    """Calls the app and gathers its answer; a single body part is not copied."""
    answer = Answer()

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        answer.status = int(status[:3])
        answer.phrase = status[4:]
        answer.headers = headers
        return no_write

    parts = app(environ, start_response)
    if type(parts) is list and len(parts) == 1:
        answer.body = parts[0]
        return answer
    answer.body = b"".join(parts)
    close = getattr(parts, "close", None)
    if close is not None:
        close()
    return answer


def no_write(_: bytes) -> NoReturn:
    """Stands for the `write` of PEP 3333."""
    raise NotImplementedError("the write() callable of PEP 3333 is not offered; return an iterable")


class AppThreads:
    """Threads for calls that may block, and what they have answered.

    A call that waits for models to load or to end must not stand in the way of one that is answered at once: each kind
    has threads of its own.

    Endpoints of plugins have threads of their own, and a limit: one that hangs costs nobody else anything.

    Args:
        wake: wakes the loop; called on a thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._pools: dict[bool, ThreadPoolExecutor] = {}
        self._finished: deque[tuple[Connection, str, Answer | Decision | Exception]] = deque()
        self._asked: dict[Connection, tuple[PluginEndpoint | Gate, ThreadCall]] = {}

    def submit(self, connection: Connection, environ: dict[str, Any], *, waits: bool) -> None:
        """Has a thread call the app.

        With `waits` it may take as long as models take to load.
        """
        pool = self._pools.get(waits)
        if pool is None:
            threads, name = (WAITING_THREADS, "management-waiting") if waits else (QUICK_THREADS, "management")
            pool = self._pools[waits] = ThreadPoolExecutor(threads, thread_name_prefix=name)
        pool.submit(self._call, connection.endpoint.app, connection, connection.request_id, environ)

    def ask_plugin(self, connection: Connection, environ: dict[str, Any], plugin: PluginEndpoint) -> None:
        """Calls a plugin's endpoint on a thread of its own; `give_up` ends the wait for it."""
        call = plugin.submit(partial(self._call, plugin.app, connection, connection.request_id, environ))
        self._asked[connection] = plugin, call

    def ask_gate(self, connection: Connection, gate: Gate, threads: DaemonThreads, ask: Callable[[], Decision]) -> None:
        """Asks the plugins that authorize, on a thread; `give_up` ends the wait for them."""
        self._asked[connection] = gate, threads.submit(partial(self._finish, connection, connection.request_id, ask))

    def give_up(self, connection: Connection) -> ServerError:
        """Stops waiting for a plugin, and interrupts it; returns the error for its client."""
        plugin, call = self._asked.pop(connection)
        error = plugin.is_late()
        call.interrupt()
        return error

    def take(self) -> tuple[Connection, Answer | Decision | Exception] | None:
        """Returns the next answer, or what was raised in its place; None when there is none."""
        while self._finished:
            connection, request_id, result = self._finished.popleft()
            # One that was given up may come after all, when the connection has gone on.
            if connection.phase == Phase.ANSWER and connection.request_id == request_id:
                self._asked.pop(connection, None)
                return connection, result
        return None

    def _call(self, app: WSGIApp, connection: Connection, request_id: str, environ: dict[str, Any]) -> None:
        self._finish(connection, request_id, lambda: call_app(app, environ))

    def _finish(self, connection: Connection, request_id: str, call: Callable[[], Answer | Decision]) -> None:
        result: Answer | Decision | Exception
        try:
            result = call()
        except BaseException as error:  # the loop logs it and answers
            result = as_exception(error)
        self._finished.append((connection, request_id, result))
        self._wake()
