"""The supervisor's control socket: one thread for each connection, one request answered at a time.

Only processes of the same user (or root) are heard: the socket's mode says so, and the kernel is asked who it is.
"""

from __future__ import annotations

import inspect
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.errors import BadRequest, InternalServerError, ServerError
from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: More connections than this at a time wait to be accepted.
MAX_CONNECTIONS = 256
_PEER_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a connection, as the kernel knows it."""

    pid: int
    uid: int


@dataclass(frozen=True, slots=True)
class Operation:
    """What can be asked for.

    Attributes:
        function: carries it out; its signature says which arguments there may be.
        told_peer: its argument `peer` is the process that asks, whatever that says.
    """

    function: Callable[..., Any]
    told_peer: bool = False

    def __call__(self, peer: Peer, arguments: dict[str, Any]) -> Any:
        """Carries it out.

        Raises:
            BadRequest: there are other arguments than it takes.
            Exception: whatever goes wrong in it.
        """
        if self.told_peer:
            arguments = {**arguments, "peer": peer}
        try:
            inspect.signature(self.function).bind(**arguments)
        except TypeError as error:
            raise BadRequest(f"Wrong arguments: {error}") from error
        return self.function(**arguments)


class ControlServer:
    """Listens on the control socket, a file of mode 0600, from `start` to `stop`."""

    def __init__(self, path: Path, operations: Mapping[str, Operation]) -> None:
        self._path = path
        self._operations = dict(operations)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._stopping = False

    def start(self) -> None:
        """Makes the socket and begins to answer; raises OSError where the socket cannot be made."""
        self._path.unlink(missing_ok=True)
        self._listener.bind(os.fspath(self._path))
        self._path.chmod(0o600)
        self._listener.listen(128)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def stop(self) -> None:
        """Closes the socket and all connections; calls under way end unanswered."""
        with self._lock:
            self._stopping = True
            connections = list(self._connections)
        # Closing a socket does not wake the thread that waits in accept; shutting it down does.
        for sock in (self._listener, *connections):
            _shut_down(sock)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            self._free.acquire()
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                self._free.release()
                if self._stopping:
                    return
                log.error("Control socket: %s", error)
                threading.Event().wait(1.0)
                continue
            with self._lock:
                self._connections.add(sock)
            try:
                threading.Thread(target=self._serve, args=(sock,), name="control", daemon=True).start()
            except RuntimeError as error:  # no further thread can be had now
                log.error("Control socket: a connection is closed unheard: %s", error)
                self._forget(sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            peer = _peer(sock)
            if peer.uid not in (0, os.getuid()):
                log.warning("Control socket: refused process %d of user %d", peer.pid, peer.uid)
                return
            channel = Channel(sock)
            while not self._stopping:
                channel.send(self._answer(peer, channel.receive()))
        except ChannelClosed:
            # Its clients come and go as they like.
            return
        except ValueError as error:
            log.warning("Control socket: process %d sent no JSON: %s", _peer(sock).pid, error)
        except Exception:
            log.exception("Control socket: a connection is closed after an unexpected error")
        finally:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._connections.discard(sock)
        sock.close()
        self._free.release()

    def _answer(self, peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
        name = request.pop("op", None)
        operation = self._operations.get(name) if isinstance(name, str) else None
        try:
            if operation is None:
                raise BadRequest(f"Unknown operation: {name}")
            return {"ok": operation(peer, request)}
        except ServerError as error:
            return {"error": error.to_dict()}
        except Exception:
            log.exception("Control operation %s failed", name)
            return {"error": InternalServerError("The server failed to carry out the operation.").to_dict()}


def _peer(sock: socket.socket) -> Peer:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, _ = _PEER_CREDENTIALS.unpack(data)
    return Peer(pid, uid)


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        log.debug("Control socket was closed already: %s", error)
