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
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.address import Address
from wsgi_ts.settings.config import Config

BACKLOG = 2048
#: The longest path of a Unix socket.
UNIX_PATH_BYTES = 107


class BindError(Exception):
    """An address cannot be listened on; the message names it, its key and the reason, on one line."""


@dataclass(frozen=True, slots=True)
class BoundListener:
    """A listening socket and the APIs that are served on it (several, where their addresses are equal).

    `kept_as` is its name among what the guard keeps.
    """

    kinds: tuple[str, ...]
    address: Address
    sock: socket.socket
    kept_as: str

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


class Wanted(NamedTuple):
    """A socket that a configuration asks for: its APIs, its address, and the keys that say where, and at which port.

    The two keys may be the same.
    """

    kinds: tuple[str, ...]
    address: Address
    address_key: str
    port_key: str

    @property
    def kept_as(self) -> str:
        """What the guard keeps it under; the same when the kernel has chosen the port."""
        return f"{self.address.scheme} {'+'.join(self.kinds)}"


def rest_sockets(config: Config) -> list[Wanted]:
    """The sockets of all REST APIs, one for each address; inference comes first."""
    kinds_of: dict[Address, list[str]] = {}
    for kind, address in config.addresses.items():
        kinds_of.setdefault(address, []).append(kind)
    keys = {address: f"{kinds[0]}_address" for address, kinds in kinds_of.items()}
    return [Wanted(tuple(kinds_of[address]), address, key, key) for address, key in keys.items()]


def grpc_sockets(config: Config) -> list[Wanted]:
    """The sockets of the gRPC APIs; inference comes first."""
    return [
        Wanted((kind,), address, f"grpc_{kind}_address", f"grpc_{kind}_port")
        for kind, address in config.grpc_addresses.items()
    ]


def bind(wanted: Iterable[Wanted], kept: Mapping[str, int]) -> list[BoundListener]:
    """Binds sockets, but those that an earlier supervisor has bound: `kept` has their descriptors by `kept_as`.

    Raises:
        BindError: one cannot be bound; none stays bound then.
    """
    bound: list[BoundListener] = []
    with contextlib.ExitStack() as on_error:
        for each in wanted:
            sock, address = _kept_socket(each, kept) or _bind(each), each.address
            if address.scheme.startswith("grpc"):
                address = replace(address, port=sock.getsockname()[1])
            bound.append(BoundListener(each.kinds, address, sock, each.kept_as))
            on_error.callback(bound[-1].close)
        on_error.pop_all()
    return bound


def _kept_socket(wanted: Wanted, kept: Mapping[str, int]) -> socket.socket | None:
    fd, address = kept.get(wanted.kept_as, -1), wanted.address
    # A Unix socket without its name can be reached by nobody.
    is_lost = address.scheme == "unix" and not os.path.exists(address.path)
    return None if fd < 0 or is_lost else socket.socket(fileno=fd)


def bind_problem(wanted: Wanted) -> str | None:
    """Why an address cannot be listened on, and what to do; None where it can. Nothing is left behind or removed."""
    address = wanted.address
    if address.scheme == "unix":
        problem = _unix_problem(address.path)
        return None if problem is None else f"{problem}; change {wanted.address_key}"
    try:
        family, target = _resolve(address)
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            # Binding alone may succeed beside a listener that allows re-use.
            sock.listen(1)
    except OSError as error:
        return _in_words(error, wanted)[1]
    return None


def _in_words(error: OSError, wanted: Wanted) -> tuple[str, str]:
    """The key that an error of a bind is about, and the error with what to do."""
    reason = error.strerror or str(error)
    # getaddrinfo has numbers of its own.
    number = None if isinstance(error, socket.gaierror) else error.errno
    address_key, port_key = wanted.address_key, wanted.port_key
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


def _bind(wanted: Wanted) -> socket.socket:
    address = wanted.address
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
        key, problem = _in_words(error, wanted)
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
