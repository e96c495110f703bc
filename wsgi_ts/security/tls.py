"""TLS in a web worker: a socket that the loop uses like a plain one.

It is non-blocking like the others: the handshake happens inside the first `recv`, and "would block" is a
BlockingIOError. So everything that holds for a plain connection (limits, bodies received into the slot, streams,
lingering) holds for this one.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from wsgi_ts.settings.config import Config

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_AGAIN = (errno.EAGAIN, "the socket is not ready")
#: One call hands OpenSSL at most so many bytes, which all have to be encrypted before the loop goes on.
_WRITE_BYTES = 65536
#: OpenSSL's reasons for refusing what a lower security level would take.
TOO_WEAK = frozenset({"EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"})


class PlainHttp(Exception):
    """A client speaks HTTP without TLS to an https listener."""


class TlsSocket(ssl.SSLSocket):
    """An accepted connection of an https listener; `server_context` makes its wrapping produce this class."""

    _first = True

    @cached_property
    def certificate(self) -> dict[str, Any] | None:
        """The client's certificate, verified, as `ssl.SSLSocket.getpeercert` tells it; None where it has shown none."""
        return self.getpeercert() or None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Decrypted bytes, empty at the end of the stream; shakes hands first.

        Raises:
            PlainHttp: the first byte begins an HTTP request, no handshake.
            BlockingIOError: nothing can be decrypted yet.
        """
        if self._first:
            # The very first byte tells TLS (22) from an HTTP method. Looked at, not taken.
            first = socket.socket.recv(self, 1, socket.MSG_PEEK)
            self._first = False
            if first.isalpha():
                raise PlainHttp
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError(*_AGAIN) from None

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        """As `recv`, into a buffer."""
        try:
            return super().recv_into(buffer, nbytes, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError(*_AGAIN) from None

    def take_pending(self) -> bytes:
        """What is decrypted already and not received: epoll does not tell of it."""
        pending = self.pending()
        return super().recv(pending) if pending else b""

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """Encrypts and sends; what would block has to be sent again as it was.

        Raises:
            BlockingIOError: the socket takes nothing now.
        """
        try:
            return super().send(memoryview(data)[:_WRITE_BYTES], flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError(*_AGAIN) from None

    def sendmsg(self, buffers: Iterable[ReadableBuffer], *_: Any) -> int:  # type: ignore[override]
        """Sends of the first buffer: a record at a time is what TLS does anyhow."""
        return self.send(next(iter(buffers)))

    def send_plain(self, data: bytes) -> int:
        """Sends without encryption, to a client that speaks none."""
        return socket.socket.send(self, data)

    def shutdown(self, how: int) -> None:
        """Says in the protocol too that nothing more comes: a client can tell that from a connection cut off."""
        # The client's own goodbye is not waited for, and where the handshake never ended there is none to say.
        with contextlib.suppress(OSError, ValueError):
            self.unwrap()
        super().shutdown(how)


def listener_context(fd: int, config: Config, protocol: str = "http/1.1") -> ssl.SSLContext:
    """The TLS settings of a process's listeners, as the configuration has them.

    Args:
        fd: a descriptor of a file with the key and the certificates as PEM.
        config: the configuration.
        protocol: what is spoken, by its ALPN name.

    Raises:
        OSError: the files are not there, or too weak for the security level (ssl.SSLError is one).
    """
    level = config.tls_security_level
    context = server_context(fd, level_for(fd) if level is None else level, protocol)
    if config.client_ca_file is not None:
        context.load_verify_locations(config.client_ca_file)
        is_required = config.client_certificate == "required"
        context.verify_mode = ssl.CERT_REQUIRED if is_required else ssl.CERT_OPTIONAL
    return context


def unheard_client_ca(config: Config) -> str:
    """What is wrong where clients are to show certificates and nothing asks for them; else empty."""
    if config.client_ca_file is None or config.serves_tls:
        return ""
    return "client_ca_file is set, and no address is https and enable_grpc_ssl is false: nobody asks for certificates"


def level_for(fd: int) -> int | None:
    """The security level to serve with where nobody has set one: None for OpenSSL's own.

    For a key or certificate that is too weak for that it is the highest one that takes it: TorchServe has none, and who
    moves over can renew the certificate then.

    Raises:
        ssl.SSLError: OpenSSL serves it at no level.
    """
    try:
        server_context(fd)
    except ssl.SSLError as error:
        level = highest_level(fd, default_security_level()) if error.reason in TOO_WEAK else None
        if level is None:
            raise
        return level
    return None


def highest_level(fd: int, below: int) -> int | None:
    """The highest security level below another at which OpenSSL serves a key and its certificates; None: at none."""
    for level in range(below - 1, -1, -1):
        with contextlib.suppress(ssl.SSLError):
            server_context(fd, level)
            return level
    return None


def server_context(fd: int, level: int | None = None, protocol: str = "http/1.1") -> ssl.SSLContext:
    """TLS 1.2 and newer, Python's choice of ciphers.

    The key and the certificates are PEM in the file behind `fd`. `level` is OpenSSL's security level, 0 to 5 (None for
    its default), `protocol` the ALPN name of what is spoken.

    Raises:
        ssl.SSLError: they are not there, or too weak for the level.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols([protocol])
    if level is not None:
        # OpenSSL takes the level as a part of the list of ciphers; those of TLS 1.3 are no part of that list.
        names = [cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"]
        context.set_ciphers(":".join([*names, f"@SECLEVEL={level}"]))
    context.load_cert_chain(f"/proc/self/fd/{fd}")
    return context


def default_security_level() -> int:
    """The security level that OpenSSL has where nobody sets one."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).security_level


def accept_tls(context: ssl.SSLContext, sock: socket.socket) -> socket.socket:
    """Makes an accepted, non-blocking socket a TLS connection; nothing is read or written yet."""
    return context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
