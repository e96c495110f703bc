"""Listening addresses as config.properties writes them: `http(s)://host:port` or `unix:/path`."""

from __future__ import annotations

import ipaddress
import re

from wsgi_ts.quick_dataclass import dataclass

_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[^\s:/\[\]]+)(?::(?P<port>[0-9]+))?|unix:(?P<path>/.*)",
    re.IGNORECASE,
)
#: Ports from here on are refused, as TorchServe does (65535 itself included).
_PORT_LIMIT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """Where one API listens.

    Attributes:
        scheme: `http`, `https` or `unix`; `grpc` or, over TLS, `grpcs` for a gRPC port.
        host: name or IP address without brackets; empty for `unix`.
        port: TCP port; 0 lets the kernel choose and is used for `unix` too.
        path: the socket's path for `unix`, else empty.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it: a Unix socket or a loopback address."""
        if self.scheme == "unix" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: who can reach it is not known
            return False

    def __str__(self) -> str:
        """The text that `parse_address` reads back."""
        if self.scheme == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def is_tls(self) -> bool:
        """Whether clients speak TLS to this address."""
        return self.scheme in ("https", "grpcs")


def parse_address(text: str, default_ports: tuple[int, int] = (80, 443)) -> Address:
    """Reads an address; where it names no port, it is the first of `default_ports` for http, the second for https.

    Raises:
        ValueError: with TorchServe's text, "Invalid binding address: …" or "Invalid port number: …".
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(f"Invalid binding address: {text}")
    if match["path"] is not None:
        return Address("unix", path=match["path"])
    scheme = match["scheme"].lower()
    port = default_ports[scheme == "https"] if match["port"] is None else int(match["port"][:6])
    if port >= _PORT_LIMIT:
        raise ValueError(f"Invalid port number: {text}")
    return Address(scheme, host=match["host"].strip("[]"), port=port)
