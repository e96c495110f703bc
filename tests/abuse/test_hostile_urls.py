"""URLs of archives that lead to where nobody may send a request: names, redirects, second answers of a name server.

The test is the name server, and every connection: none of it leaves this machine.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.model_archives import Place, mar

from wsgi_ts.archive.download import DownloadRules
from wsgi_ts.errors import DownloadFailed

PUBLIC = "93.184.215.14"
PUBLIC_V6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
#: Never contacted, whatever is allowed: metadata services of clouds, multicast, "any".
NEVER = (
    *("169.254.169.254", "169.254.170.2", "fe80::a9fe:a9fe", "0.0.0.0", "::", "224.0.0.1", "ff02::1"),
    *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::169.254.169.254"),
    "2001:0:a9fe:a9fe:0:0:5601:5601",
)
#: Not where a public address has redirected to, and nowhere with `allow_private` off.
PRIVATE = (
    *("127.0.0.1", "127.255.255.254", "::1", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1"),
    *("198.18.0.1", "203.0.113.7", "240.0.0.1", "255.255.255.255", "fc00::1", "fd00:ec2::254"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "::127.0.0.1"),
    "2001:db8::1",
)


class Network:
    """Names and what they mean, answers by address, and to whom anybody has connected."""

    def __init__(self, archive: bytes) -> None:
        self.names: dict[str, list[list[str]]] = {}
        self.redirect = ""
        self.connected: list[str] = []
        self.sockets: list[socket.socket] = []
        self._archive = archive

    def resolve(self, host: str, port: int, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        answers = self.names.get(host, [[host]])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        found = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            found.append((family, socket.SOCK_STREAM, 6, "", (address, port)))
        return found

    def connect(self, address: tuple[str, int], **_: Any) -> socket.socket:
        """A connection to a server that redirects once, where it has to, and has the archive otherwise."""
        self.connected.append(address[0])
        here, there = socket.socketpair()
        if self.redirect:
            answer, self.redirect = f"HTTP/1.1 302 Found\r\nLocation: {self.redirect}\r\n\r\n".encode(), ""
        else:
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self._archive) + self._archive
        there.sendall(answer)
        there.shutdown(socket.SHUT_WR)
        self.sockets.append(there)
        return here


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def network(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    network = Network(mar(place.root / "source.mar").read_bytes())
    monkeypatch.setattr("wsgi_ts.archive.download.socket.getaddrinfo", network.resolve)
    monkeypatch.setattr("wsgi_ts.archive.download.socket.create_connection", network.connect)
    yield network
    for sock in network.sockets:
        sock.close()


def url_of(address: str) -> str:
    return f"http://[{address}]/m.mar" if ":" in address else f"http://{address}/m.mar"


def test_a_public_address_is_fetched_from(place: Place, network: Network) -> None:
    for number, address in enumerate((PUBLIC, PUBLIC_V6)):
        url = url_of(address).replace("m.mar", f"m{number}.mar")
        assert place.open(url, rules=DownloadRules(allow_private=False)).extracted
    assert network.connected == [PUBLIC, PUBLIC_V6]


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("way", ["address", "name", "second address", "redirect", "redirect to a name"])
def test_addresses_that_are_never_contacted(place: Place, network: Network, address: str, way: str) -> None:
    contacted = refuse(place, network, address, way, DownloadRules())
    assert contacted <= {PUBLIC}


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("way", ["address", "name", "second address"])
def test_private_addresses_where_they_are_not_allowed(place: Place, network: Network, address: str, way: str) -> None:
    assert not refuse(place, network, address, way, DownloadRules(allow_private=False))


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("way", ["redirect", "redirect to a name"])
def test_a_public_address_does_not_redirect_to_a_private_one(
    place: Place, network: Network, address: str, way: str
) -> None:
    assert refuse(place, network, address, way, DownloadRules()) == {PUBLIC}


def refuse(place: Place, network: Network, address: str, way: str, rules: DownloadRules) -> set[str]:
    """Registers a URL that leads to the address in this way; returns who was contacted."""
    network.names = {"models.test": [[PUBLIC]], "evil.test": [[address]], "both.test": [[PUBLIC, address]]}
    url = {
        "address": url_of(address),
        "name": "http://evil.test/m.mar",
        "second address": "http://both.test/m.mar",
    }.get(way, "http://models.test/m.mar")
    if way.startswith("redirect"):
        network.redirect = url_of(address) if way == "redirect" else "http://evil.test/m.mar"
    message = place.refuse(url, DownloadFailed, rules=rules)
    assert message == f"Failed to download archive from: {url}"
    return set(network.connected)


def test_a_name_that_means_another_address_the_second_time(place: Place, network: Network) -> None:
    """What was looked at is what is connected to: the second answer is never asked for."""
    network.names = {"rebinds.test": [[PUBLIC], ["127.0.0.1"]]}
    assert place.open("http://rebinds.test/m.mar", rules=DownloadRules(allow_private=False)).extracted
    assert network.connected == [PUBLIC]


def test_a_name_that_means_another_address_behind_a_redirect(place: Place, network: Network) -> None:
    network.names = {"rebinds.test": [[PUBLIC], ["127.0.0.1"]]}
    network.redirect = "http://rebinds.test/again.mar"
    place.refuse("http://rebinds.test/m.mar", DownloadFailed)
    assert network.connected == [PUBLIC]


@pytest.mark.parametrize(
    "target",
    [
        *("file:///etc/passwd", "ftp://models.test/m.mar", "gopher://models.test/", "data:,x", "jar:http://x/y!/z"),
        *(
            "//evil.test/m.mar",
            "http://models.test@evil.test/m.mar",
            "http://evil.test#@models.test/m.mar",
        ),
        *("http://models.test\\@evil.test/m.mar", "http://evil.test:99999/m.mar", "http://[::1/m.mar"),
    ],
)
def test_redirects_to_what_is_no_such_url(place: Place, network: Network, target: str) -> None:
    network.names = {"models.test": [[PUBLIC]], "evil.test": [["127.0.0.1"]]}
    network.redirect = target
    place.refuse("http://models.test/m.mar", DownloadFailed)
    assert network.connected == [PUBLIC]
