"""Listening sockets that a service manager has opened before the server is started (systemd's socket activation).

They stay open when the server ends, so that a restart refuses no connection: who comes meanwhile waits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from wsgi_ts.instance.listeners import BACKLOG, kept_name
from wsgi_ts.settings.address import Address
from wsgi_ts.settings.config import Config, ConfigError

#: Where the descriptors begin.
_FIRST_FD = 3


def handed_sockets(config: Config, environ: MutableMapping[str, str]) -> dict[str, int]:
    """Returns the descriptors that are meant for this process, by the names under which the guard keeps them.

    The variables that tell of them are removed, since no other process may believe they are for it.

    Raises:
        ConfigError: a socket is none of this configuration's.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    kinds_of: dict[Address, list[str]] = {}
    for kind, address in config.addresses.items():
        kinds_of.setdefault(address, []).append(kind)
    ours = [_Api(tuple(kinds), address, f"{kinds[0]}_address") for address, kinds in kinds_of.items()]
    ours += [_Api((f"grpc_{kind}",), address, f"grpc_{kind}_port") for kind, address in config.grpc_addresses.items()]
    found = {}
    for number in range(int(count)):
        fd = _FIRST_FD + number
        found[_name(fd, names[number] if number < len(names) else "", ours)] = fd
    return found


@dataclass(frozen=True, slots=True)
class _Api:
    """What is served on one socket: the names that a unit may give it, its address, and the key that says where."""

    names: tuple[str, ...]
    address: Address
    key: str

    @property
    def kept_as(self) -> str:
        return kept_name(tuple(name.removeprefix("grpc_") for name in self.names), self.address)


def _name(fd: int, given: str, apis: Sequence[_Api]) -> str:
    """What the guard is to keep a socket as; `given` is the FileDescriptorName of its unit."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        where = sock.getsockname()
        port = where[1] if sock.family in (socket.AF_INET, socket.AF_INET6) else None
        is_ours = sock.type == socket.SOCK_STREAM and port is not None
        if is_ours:
            # A unit's own backlog may be shorter.
            sock.listen(BACKLOG)
    for api in apis:
        if is_ours and (given in api.names or api.address.port == port) and api.address.scheme != "unix":
            return api.kept_as
    known = ", ".join(f"{api.key} {api.address}" for api in apis)
    raise ConfigError(f"the service manager hands over a socket on {where}, which is none of {known}; correct its unit")
