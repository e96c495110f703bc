"""The WSGI side of a web worker: what the app gets, and its answer as one object."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

from wsgi_ts.rest.tokens import ADMITTED_KEY

StartResponse = Callable[..., Any]
WSGIApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]

_NO_INPUT = io.BytesIO(b"")


class AppResponse:
    """What the app has returned, as one object."""

    __slots__ = ("body", "code", "headers", "status")

    def __init__(self) -> None:
        self.status = "500 "
        self.code = 500
        self.headers: list[tuple[str, str]] = []
        self.body: bytes | memoryview = b""

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        """WSGI's start_response."""
        self.status = status
        self.code = int(status[:3])
        self.headers = headers
        return self._no_write

    @staticmethod
    def _no_write(_: bytes) -> None:
        raise NotImplementedError("the write() callable of PEP 3333 is not offered; return an iterable")


def call_app(app: WSGIApp, environ: dict[str, Any]) -> AppResponse:
    """Calls the app and gathers its answer; a single body part is not copied."""
    response = AppResponse()
    parts = app(environ, response.start)
    if type(parts) is list and len(parts) == 1:
        response.body = parts[0]
        return response
    response.body = b"".join(parts)
    close = getattr(parts, "close", None)
    if close is not None:
        close()
    return response


def base_environ(sock: socket.socket, scheme: str) -> dict[str, Any]:
    """The WSGI variables that are the same for all requests of a listener."""
    name = sock.getsockname()
    server, port = (str(name[0]), str(name[1])) if isinstance(name, tuple) else (str(name), "")
    return {
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": _NO_INPUT,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": False,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "SCRIPT_NAME": "",
        "SERVER_NAME": server,
        "SERVER_PORT": port,
        ADMITTED_KEY: True,
    }
