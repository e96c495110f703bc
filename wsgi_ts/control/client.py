"""A client of the supervisor's control socket: what the management API, gRPC and the command line call.

Requests are `{"op": NAME, ...}`, answers `{"ok": RESULT}` or `{"error": {code, type, message}}`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.errors import InternalServerError, ServerError, ServiceUnavailable
from wsgi_ts.process import is_readable
from wsgi_ts.run_files import RunFiles

log = logging.getLogger(__name__)


class NotReachable(ServiceUnavailable):
    """No supervisor answers in the run directory: it is not running, or it is starting or stopping."""

    def __init__(self) -> None:
        super().__init__("The server is restarting or stopping. Please try again in a few seconds.")


#: How long to wait for the supervisor to accept, in seconds.
CONNECT_TIMEOUT_S = 5.0
#: Longest wait in calls that load and stop nothing, in seconds.
QUICK_CALL_S = 60.0
#: Idle connections kept for the next call.
MAX_IDLE = 8


class ControlPlane:
    """Calls to the supervisor that has its socket in a run directory, from any number of threads.

    Each call has a connection to itself; idle ones are kept and used again. Connections are made on the
    first call, so an object made before a fork is safe to use after it.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self._path = os.fspath(RunFiles(run_dir).control_socket)
        self._idle: list[Channel] = []
        self._lock = threading.Lock()
        self._closed = False

    def call(self, op: str, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Asks the supervisor and waits for its answer.

        Args:
            op: the operation's name.
            timeout_s: how long the answer may take, in seconds; None waits as long as the supervisor lives,
                which is right for what the supervisor itself bounds (a synchronous register lasts as long
                as the model loads).
            **arguments: the operation's arguments; those that are None are left out.

        Returns:
            The answer's RESULT.

        Raises:
            ServerError: the error the supervisor answered with; ServiceUnavailable when it cannot be reached
                or went away before it answered.
        """
        request = {"op": op, **{name: value for name, value in arguments.items() if value is not None}}
        channel = self._take()
        with contextlib.ExitStack() as on_error:
            # What is left on the connection (half a request, a late answer) must not reach the next call.
            on_error.callback(channel.close)
            try:
                channel.sock.settimeout(timeout_s)
                answer = channel.call(request)
            except TimeoutError as error:
                raise ServiceUnavailable(f"The server did not answer within {timeout_s} seconds.") from error
            except ChannelClosed as error:
                raise NotReachable() from error
            on_error.pop_all()
        self._put_back(channel)
        if "error" in answer:
            raise ServerError.from_dict(answer["error"])
        if "ok" not in answer:
            log.error("The supervisor's answer to %s is neither a result nor an error: %r", op, answer)
            raise InternalServerError("The server answered a management request in an unknown form.")
        return answer["ok"]

    def close(self) -> None:
        """Closes the idle connections, and those in use when their call ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def _take(self) -> Channel:
        while True:
            with self._lock:
                channel = self._idle.pop() if self._idle else None
            if channel is None:
                return self._connect()
            # An idle one that can be read was closed by its peer: nobody sends unasked.
            if not is_readable(channel.fileno()):
                return channel
            channel.close()

    def _put_back(self, channel: Channel) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE:
                self._idle.append(channel)
                return
        channel.close()

    def _connect(self) -> Channel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as on_error:
            on_error.callback(sock.close)
            sock.settimeout(CONNECT_TIMEOUT_S)
            try:
                sock.connect(self._path)
            except OSError as error:
                raise NotReachable() from error
            on_error.pop_all()
        return Channel(sock)
