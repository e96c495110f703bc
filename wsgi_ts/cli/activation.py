"""Listening sockets that a service manager has opened before the server is started (systemd's socket activation).

They stay open when the server ends, so that a restart refuses no connection: who comes meanwhile waits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from wsgi_ts.instance.listeners import BACKLOG, Wanted, grpc_sockets, rest_sockets
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
    # What a unit may call each: `inference`, `grpc_inference`.
    ours = {kind: each for each in rest_sockets(config) for kind in each.kinds}
    ours |= {f"grpc_{each.kinds[0]}": each for each in grpc_sockets(config)}
    found = {}
    for number in range(int(count)):
        fd = _FIRST_FD + number
        found[_name(fd, names[number] if number < len(names) else "", ours)] = fd
    return found


def _name(fd: int, given: str, ours: Mapping[str, Wanted]) -> str:
    """What the guard is to keep a socket as; `given` is the FileDescriptorName of its unit."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        where = sock.getsockname()
        port = where[1] if sock.family in (socket.AF_INET, socket.AF_INET6) else None
        is_ours = sock.type == socket.SOCK_STREAM and port is not None
        if is_ours:
            # A unit's own backlog may be shorter.
            sock.listen(BACKLOG)
    for name, each in ours.items():
        if is_ours and (given == name or each.address.port == port) and each.address.scheme != "unix":
            return each.kept_as
    known = ", ".join(f"{each.port_key} {each.address}" for each in dict.fromkeys(ours.values()))
    raise ConfigError(f"the service manager hands over a socket on {where}, which is none of {known}; correct its unit")
