"""Fetches a model archive from a URL into the model store, without being led to a place nobody allowed.

The address of every hop is resolved once, checked and then connected to as it is, so a second DNS answer
changes nothing. The file grows under a hidden name in the store and gets its real name in one step.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import logging
import os
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from wsgi_ts.archive.entries import ArchiveLimits, escape_name
from wsgi_ts.archive.s3 import s3_headers
from wsgi_ts.errors import DownloadFailed, InternalServerError, ModelNotFound, OutOfResources
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import DEFAULT_ALLOWED_URLS

log = logging.getLogger(__name__)

_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 18
#: Between two lines in the log that say how far a download is, in seconds.
_PROGRESS_S = 5.0
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_SCHEMES = ("http", "https", "file")
#: What is wrong here, and not where an archive comes from.
_OURS = (errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: The IPv4 address is the end of these: NAT64 (RFC 6052), and the form of old ("::127.0.0.1").
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")


class Fetchers(Protocol):
    """Fetches from URLs of other schemes, and says whether what was fetched may be used. Both raise OSError."""

    @property
    def schemes(self) -> frozenset[str]:
        """In lower case."""

    def open(self, url: str, target: Path, limit_s: float) -> None:
        """Writes what the URL names into a file."""

    def verify(self, url: str, path: Path, limit_s: float) -> None:
        """Looks at a fetched file."""


@dataclass(frozen=True, slots=True)
class DownloadRules:
    """Which URLs an archive may come from.

    Args:
        allowed_urls: regular expressions; one of them has to match the whole URL, letter case ignored. Each
            redirect is held to them too.
        allow_private: whether loopback and private addresses may be contacted. A redirect from a public to a
            private address is refused in any case, link-local (cloud metadata) addresses always.
        s3_sse_kms: whether an object of S3 is asked for as one that is encrypted with a key of KMS.
        fetchers: further schemes; while `allowed_urls` is not set, all their URLs are allowed.

    Raises:
        ValueError: an expression is not one.
    """

    allowed_urls: tuple[str, ...] = DEFAULT_ALLOWED_URLS
    allow_private: bool = True
    s3_sse_kms: bool = False
    fetchers: Fetchers | None = None

    def __post_init__(self) -> None:
        """Compiles each expression once, to find a wrong one at start instead of at the first registration."""
        for pattern in self.allowed_urls:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"allowed_urls: {pattern!r} is not a regular expression ({error}): correct it"
                ) from error

    def match(self, url: str) -> bool:
        """Whether some expression matches the whole of `url`."""
        if self.allowed_urls == DEFAULT_ALLOWED_URLS and self.has_own(url):
            return True
        return any(re.fullmatch(pattern, url, re.IGNORECASE) for pattern in self.allowed_urls)

    def has_own(self, url: str) -> bool:
        """Whether the URL has one of the further schemes."""
        return self.fetchers is not None and url.partition("://")[0].lower() in self.fetchers.schemes


class _Refused(Exception):
    """Why a download did not happen: for the log, the client gets TorchServe's one sentence."""


def is_fetched(url: str, rules: DownloadRules) -> bool:
    """Whether `url` is to be fetched; otherwise it is the name of a file in the model store, whatever it looks like.

    TorchServe knows three schemes as URLs, and others only where `allowed_urls` speaks of them.
    """
    match = _URL.match(url)
    return match is not None and (match[1].lower() in _SCHEMES or rules.has_own(url) or rules.match(url))


def fetch_archive(url: str, model_store: Path, rules: DownloadRules, limits: ArchiveLimits) -> Path:
    """Copies what `url` (http, https or file) points to into the model store; returns the new file.

    Raises:
        ModelNotFound: no pattern of `rules` allows the URL.
        InternalServerError: the store already has a file of that name, or cannot be written; the latter is logged.
        DownloadFailed: it could not be fetched whole; the reason is logged, nothing is left in the store.
        OutOfResources: the disk is full.
    """
    if not rules.match(url):
        raise ModelNotFound(f"Given URL {url} does not match any allowed URL(s)")
    try:
        parts = _checked_parts(url, own=rules.has_own(url))
        name = (parts.path or parts.netloc).rpartition("/")[2]
        if not name or len(name) > 200 or name in (".", ".."):
            raise _Refused("the path of the URL has no usable file name at its end")
        target = model_store / name
        if os.path.lexists(target):
            raise FileExistsError(name)
        if rules.fetchers is not None and rules.has_own(url):
            _have_fetched(rules.fetchers, url, target, limits)
        else:
            chunks = _read_local(parts) if parts.scheme == "file" else _read_http(url, rules, limits)
            with contextlib.closing(chunks):
                _save(chunks, target, limits)
        if rules.fetchers is not None:
            _verify(rules.fetchers, url, target, limits)
    except FileExistsError as error:
        raise InternalServerError(f"Model file already exists {name}") from error
    except (_Refused, OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources("Not enough disk space to download the model archive.") from error
        log.warning("Download of %s failed: %s", _shown(url), error)
        if isinstance(error, OSError) and error.errno in _OURS:
            raise InternalServerError(f"Failed to save model: {url}") from error
        raise DownloadFailed(f"Failed to download archive from: {url}") from error
    return target


def _shown(url: str) -> str:
    """A URL for the log: without its query, which may hold a signature."""
    return escape_name(url.partition("?")[0])


def _have_fetched(fetchers: Fetchers, url: str, target: Path, limits: ArchiveLimits) -> None:
    """Has a plugin fetch an archive, which appears whole or not at all."""
    part = target.with_name(f".{secrets.token_hex(16)}.part")
    try:
        fetchers.open(url, part, limits.download_timeout_s)
        if not part.is_file() or part.is_symlink():
            raise _Refused("the plugin has written no file")
        if part.stat().st_size > limits.max_archive_bytes:
            raise _Refused(f"it is larger than {limits.max_archive_bytes} bytes")
        _give_name(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _verify(fetchers: Fetchers, url: str, target: Path, limits: ArchiveLimits) -> None:
    """Asks the plugins whether a fetched archive may be used; one that may not is removed."""
    try:
        fetchers.verify(url, target, limits.download_timeout_s)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _checked_parts(url: str, *, own: bool = False) -> SplitResult:
    """The parts of a URL that two readers cannot understand differently."""
    if _UNSAFE.search(url):
        raise _Refused("the URL has a space, control character or backslash: percent-encode it")
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise _Refused("the URL has a user name before its host: leave it out")
    if parts.scheme not in _SCHEMES and not own:
        raise _Refused(f"scheme {parts.scheme} cannot be fetched: use https, http or file")
    if parts.scheme != "file" and not parts.hostname:
        raise _Refused("the URL has no host")
    return parts


def _read_local(parts: SplitResult) -> Generator[bytes, None, None]:
    if parts.netloc not in ("", "localhost"):
        raise _Refused("a file URL has to name a file of this machine: file:///path")
    path = unquote(parts.path)
    if ".." in path.split("/") or "\0" in path or not os.path.isfile(path):
        raise _Refused("no such regular file")
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _read_http(url: str, rules: DownloadRules, limits: ArchiveLimits) -> Generator[bytes, None, None]:
    """The body at `url`, after at most five redirects, each of them checked like the first address."""
    deadline = time.monotonic() + limits.download_timeout_s
    came_from_public = False
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _checked_parts(url)
        address = _resolve(parts, rules, came_from_public)
        connection = _connect(parts, address, limits)
        with contextlib.closing(connection), _time_limit(connection.sock, deadline):
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept-Encoding": "identity", "Connection": "close"}
            headers |= s3_headers(parts, os.environ, sse_kms=rules.s3_sse_kms)
            connection.request("GET", target, headers=headers)
            # The response keeps the socket open on its own: it is closed for itself.
            with contextlib.closing(connection.getresponse()) as response:
                if response.status not in (http.client.OK, *_REDIRECTS):
                    raise _Refused(f"the server answered {response.status}{_cut(parts.query)}")
                if response.status not in _REDIRECTS:
                    yield from _body(_shown(url), response, limits, deadline)
                    return
                came_from_public = came_from_public or address.is_global
                url = _next_hop(url, response.getheader("Location"), rules)
    raise _Refused(f"more than {_MAX_REDIRECTS} redirects")


def _cut(query: str) -> str:
    """What to say of a query whose other parameters may have gone to the request that named the URL."""
    if not query or "&" in query:
        return ""
    return ": if its query has several parameters, register the URL with %26 for each & in it"


def _next_hop(url: str, location: str | None, rules: DownloadRules) -> str:
    if not location:
        raise _Refused("a redirect without an address")
    following = urljoin(url, location)
    if not rules.match(following):
        raise _Refused("redirected to an address that allowed_urls does not allow")
    scheme = urlsplit(following).scheme
    if scheme != "https" and (scheme != "http" or urlsplit(url).scheme == "https"):
        raise _Refused(f"redirected from {urlsplit(url).scheme} to {scheme}")
    return following


def _resolve(parts: SplitResult, rules: DownloadRules, came_from_public: bool) -> _Address:
    """One address of the host; refused if any of them is where no archive may come from."""
    host = parts.hostname or ""
    found = socket.getaddrinfo(host, parts.port or 0, type=socket.SOCK_STREAM)
    addresses = [_plain_address(str(entry[4][0])) for entry in found]
    for address in [*addresses, *map(_reached_by, addresses)]:
        if address.is_link_local or address.is_multicast or address.is_unspecified:
            raise _Refused(f"{host} is {address}: link-local, multicast and 0.0.0.0 are never contacted")
        if not address.is_global and (came_from_public or not rules.allow_private):
            raise _Refused(f"{host} is {address}, a private address")
    return addresses[0]


def _plain_address(text: str) -> _Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else ipaddress.IPv4Address(mapped)


def _reached_by(address: _Address) -> _Address:
    """Where a gateway leads that knows an IPv6 address for another's IPv4 one: itself for all others."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address in _TRANSLATED or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour or (address.teredo[1] if address.teredo else address)


def _connect(parts: SplitResult, address: _Address, limits: ArchiveLimits) -> http.client.HTTPConnection:
    """A connection to exactly this address; TLS checks the certificate against the host's name."""
    host = parts.hostname or ""
    timeout_s = limits.stall_timeout_s
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    # Without a port it would look for one behind the last colon, also of an IPv6 address.
    connection = kind(host, parts.port or kind.default_port, timeout=timeout_s)
    plain = socket.create_connection((str(address), connection.port), timeout=timeout_s)
    try:
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        else:
            connection.sock = plain
    except BaseException:
        plain.close()
        raise
    return connection


@contextlib.contextmanager
def _time_limit(sock: socket.socket, deadline: float) -> Iterator[None]:
    """Shuts the connection down at `deadline`, which also ends a server that sends a byte a minute."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _body(name: str, response: http.client.HTTPResponse, limits: ArchiveLimits, deadline: float) -> Iterator[bytes]:
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise _Refused("the server sent an encoded body although none was asked for")
    expected = response.length
    if expected is not None and expected > limits.max_archive_bytes:
        raise _Refused(f"it is larger than {limits.max_archive_bytes} bytes")
    received = 0
    of_all = "" if expected is None else f" of {expected}"
    tell_at = time.monotonic() + _PROGRESS_S
    while chunk := response.read1(_CHUNK_BYTES):
        received += len(chunk)
        if time.monotonic() >= tell_at:
            tell_at = time.monotonic() + _PROGRESS_S
            log.info("Downloading %s: %d%s bytes", name, received, of_all)
        yield chunk
    log.info("Downloaded %s: %d bytes", name, received)
    if time.monotonic() >= deadline:
        raise _Refused(f"it took longer than {limits.download_timeout_s:g} s")
    if expected is not None and received != expected:
        raise _Refused(f"the connection ended after {received} of {expected} bytes")


def _save(chunks: Iterator[bytes], target: Path, limits: ArchiveLimits) -> None:
    """Writes the chunks to a new file `target`, which appears whole or not at all.

    Raises:
        FileExistsError: another registration has made `target` in the meantime.
    """
    part = target.with_name(f".{secrets.token_hex(16)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(part, flags, 0o644), "wb") as file:
            total = 0
            for chunk in chunks:
                total += len(chunk)
                if total > limits.max_archive_bytes:
                    raise _Refused(f"it is larger than {limits.max_archive_bytes} bytes")
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        _give_name(part, target)
    finally:
        part.unlink(missing_ok=True)


def _give_name(part: Path, target: Path) -> None:
    """Makes `part` appear as `target`; a link, unlike a rename, never replaces another registration's file."""
    try:
        os.link(part, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(target):
            raise FileExistsError(target.name) from error
        part.rename(target)
