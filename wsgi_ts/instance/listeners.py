"""The listening sockets: bound once by the supervisor, handed down to gunicorn and the gRPC server by descriptor.

So one of them that is started again refuses nobody, and a port that is taken is an error before anything runs. The
guard keeps them, too, under the names that `kept_as` gives: nor does a supervisor that is started again refuse anybody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wsgi_ts.settings.address import Address
from wsgi_ts.settings.config import Config

BACKLOG = 2048
#: The longest path of a Unix socket.
UNIX_PATH_BYTES = 107


class BindError(Exception):
    """An address cannot be listened on; the message names it, its key and the reason, on one line."""


@dataclass(frozen=True, slots=True)
class BoundListener:
    """A listening socket and the APIs that are served on it (several, where their addresses are equal)."""

    kinds: tuple[str, ...]
    address: Address
    sock: socket.socket

    @property
    def kept_as(self) -> str:
        """Its name among what the guard keeps."""
        return kept_name(self.kinds, self.address)

    @property
    def argument(self) -> str:
        """Its form on gunicorn's command line."""
        return f"{'+'.join(self.kinds)}={self.sock.fileno()}"

    def close(self) -> None:
        """Closes this process's copy; a Unix socket loses its name."""
        self.sock.close()
        if self.address.scheme == "unix":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.path)


def kept_name(kinds: tuple[str, ...], address: Address) -> str:
    """What the guard keeps the socket of an address under; the same when the kernel has chosen the port."""
    return f"{address.scheme} {'+'.join(kinds)}"


def bind_all(config: Config, kept: Mapping[str, int]) -> list[BoundListener]:
    """Binds the addresses of all APIs; inference comes first.

    `kept` has the descriptors of sockets that an earlier supervisor has bound, by `kept_as`.

    Raises:
        BindError: one cannot be bound; none stays bound then.
    """
    kinds_of: dict[Address, list[str]] = {}
    for kind, address in config.addresses.items():
        kinds_of.setdefault(address, []).append(kind)
    bound: list[BoundListener] = []
    with contextlib.ExitStack() as on_error:
        for address, kinds in kinds_of.items():
            key = f"{kinds[0]}_address"
            sock = _kept_socket(tuple(kinds), address, kept) or _bind(address, key, key)
            listener = BoundListener(tuple(kinds), address, sock)
            on_error.callback(listener.close)
            bound.append(listener)
        on_error.pop_all()
    return bound


def bind_grpc(config: Config, kept: Mapping[str, int]) -> list[BoundListener]:
    """Binds the ports of the gRPC APIs; inference comes first. See `bind_all`."""
    bound: list[BoundListener] = []
    with contextlib.ExitStack() as on_error:
        for kind, address in config.grpc_addresses.items():
            sock = _kept_socket((kind,), address, kept) or _bind(address, f"grpc_{kind}_address", f"grpc_{kind}_port")
            listener = BoundListener((kind,), replace(address, port=sock.getsockname()[1]), sock)
            on_error.callback(listener.close)
            bound.append(listener)
        on_error.pop_all()
    return bound


def _kept_socket(kinds: tuple[str, ...], address: Address, kept: Mapping[str, int]) -> socket.socket | None:
    fd = kept.get(kept_name(kinds, address), -1)
    # A Unix socket without its name can be reached by nobody.
    is_lost = address.scheme == "unix" and not os.path.exists(address.path)
    return None if fd < 0 or is_lost else socket.socket(fileno=fd)


def bind_problem(address: Address, address_key: str, port_key: str) -> str | None:
    """Why an address cannot be listened on, and what to do; None where it can. Nothing is left behind or removed.

    The keys that say where, and at which port, may be the same.
    """
    if address.scheme == "unix":
        problem = _unix_problem(address.path)
        return None if problem is None else f"{problem}; change {address_key}"
    try:
        family, target = _resolve(address)
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            # Binding alone may succeed beside a listener that allows re-use.
            sock.listen(1)
    except OSError as error:
        return _in_words(error, address_key, port_key)[1]
    return None


def _in_words(error: OSError, address_key: str, port_key: str) -> tuple[str, str]:
    """The key that an error of a bind is about, and the error with what to do."""
    reason = error.strerror or str(error)
    # getaddrinfo has numbers of its own.
    number = None if isinstance(error, socket.gaierror) else error.errno
    if number == errno.EADDRINUSE:
        return port_key, f"{reason}; stop what uses it, or change {port_key}"
    if number == errno.EACCES:
        return port_key, f"{reason}; change {port_key} to a port from 1024 on, or to a folder that can be written"
    return address_key, f"{reason}; correct {address_key}"


def _unix_problem(path: str) -> str | None:
    if len(os.fsencode(path)) > UNIX_PATH_BYTES:
        return f"AF_UNIX path too long (at most {UNIX_PATH_BYTES} bytes)"
    folder = os.path.dirname(path)
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} is not a directory that can be written"
    if not os.path.lexists(path):
        return None
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return "there is a file of this name"
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            return None
        except OSError as error:
            return error.strerror or str(error)
    return "a server listens there"


def _bind(address: Address, address_key: str, port_key: str) -> socket.socket:
    try:
        family, target = _resolve(address)
        sock = socket.socket(family, socket.SOCK_STREAM)
        with contextlib.ExitStack() as on_error:
            on_error.callback(sock.close)
            if family == socket.AF_UNIX:
                _remove_stale(address.path)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            sock.listen(BACKLOG)
            on_error.pop_all()
    except OSError as error:
        key, problem = _in_words(error, address_key, port_key)
        raise BindError(f"Failed to bind to address: {address} ({key}): {problem}") from error
    return sock


def _resolve(address: Address) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if address.scheme == "unix":
        return socket.AF_UNIX, address.path
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # "localhost" may mean both; TorchServe's clients know it as 127.0.0.1.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, _, _, _, target = found[0]
    return family, (str(target[0]), int(target[1]))


def _remove_stale(path: str) -> None:
    """Removes a Unix socket that nobody listens on; anything else stays, and bind fails."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
