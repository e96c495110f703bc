"""Archives fetched from URLs: limits, redirects and addresses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.model_archives import Place, mar

from wsgi_ts.archive.download import DownloadRules
from wsgi_ts.archive.entries import ArchiveLimits
from wsgi_ts.archive.model_directory import ModelDirectory, remove_downloaded_archive, remove_model_directory
from wsgi_ts.errors import (
    DownloadFailed,
    InternalServerError,
    ModelNotFound,
    ServerError,
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A fresh place."""
    return Place(tmp_path)


class Origin:
    """A web server whose answers the test decides."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.seen: list[str] = []
        origin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                origin.seen.append(self.path)
                origin.answers[self.path](self)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the test's output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: bytes = b"", status: int = 200, length: int | None = None, **headers: str) -> str:
        """Answer `path` so; returns its URL."""

        def send(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body) if length is None else length))
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)
            handler.close_connection = True

        self.answers[path] = send
        return self.url + path


@pytest.fixture
def origin() -> Iterator[Origin]:
    """A running origin."""
    origin = Origin()
    yield origin
    origin.server.shutdown()
    origin.server.server_close()


def archive_bytes(tmp: Path) -> bytes:
    """A small model archive."""
    return mar(tmp / "source.mar").read_bytes()


def test_download(place: Place, origin: Origin) -> None:
    url = origin.answer("/dir/m.mar?sig=1", archive_bytes(place.root))
    opened = place.open(url)
    assert opened.downloaded == place.store / "m.mar"
    assert opened.manifest.model_name == "probe" and opened.url == url
    assert place.refuse(url, InternalServerError) == "Model file already exists m.mar"
    assert len(origin.seen) == 1
    remove_model_directory(opened)
    assert (place.store / "m.mar").exists()
    remove_downloaded_archive(opened)
    assert list(place.store.iterdir()) == []


def test_download_of_something_else_leaves_nothing(place: Place, origin: Origin) -> None:
    assert "HTML page" in place.refuse(origin.answer("/m.mar", b"<html>login</html>"))


def test_nobody_listens(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    url = f"http://127.0.0.1:{port}/x.mar"
    assert place.refuse(url, DownloadFailed) == f"Failed to download archive from: {url}"


def test_answers_that_are_no_archive(place: Place, origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    body = archive_bytes(place.root)
    limits = ArchiveLimits(max_archive_bytes=len(body) - 1)
    for url, options, reason in [
        (origin.answer("/a.mar", b"secret body", 404), {}, "the server answered 404"),
        (origin.answer("/b.mar?a=1&b=2", b"", 500), {}, "the server answered 500\n"),
        # What the management API has read of `url=…/p.mar?X-Amz-Algorithm=…&X-Amz-Date=…`.
        (origin.answer("/p.mar?X-Amz-Algorithm=A", b"", 403), {}, "answered 403: if its query has several parameters"),
        (origin.answer("/c.mar", body, length=len(body) + 9), {}, "the connection ended after"),
        (origin.answer("/d.mar", body, Content_Encoding="gzip"), {}, "encoded body"),
        (origin.answer("/e.mar", body), {"limits": limits}, "it is larger than"),
        (origin.answer("/f/", body), {}, "no usable file name"),
    ]:
        caplog.clear()
        message = place.refuse(url, DownloadFailed, **options)
        assert message == f"Failed to download archive from: {url}"
        assert reason in caplog.text


def test_body_without_length_is_counted(place: Place, origin: Origin) -> None:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(bytes(200_000))
        handler.close_connection = True

    origin.answers["/m.mar"] = send
    place.refuse(f"{origin.url}/m.mar", DownloadFailed, limits=ArchiveLimits(max_archive_bytes=100_000))


@pytest.mark.parametrize("where", ["head", "body"])
def test_trickle_ends_at_the_time_limit(place: Place, origin: Origin, where: str) -> None:
    stop = threading.Event()

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if where == "body" else b""))
        while not stop.wait(0.02):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return

    origin.answers["/m.mar"] = send
    limits = ArchiveLimits(download_timeout_s=0.3, stall_timeout_s=5.0)
    place.refuse(f"{origin.url}/m.mar", DownloadFailed, limits=limits)
    stop.set()


def test_stall_ends_at_the_stall_limit(place: Place, origin: Origin) -> None:
    stop = threading.Event()
    origin.answers["/m.mar"] = lambda handler: (stop.wait(20), None)[1]
    limits = ArchiveLimits(download_timeout_s=60.0, stall_timeout_s=0.2)
    place.refuse(f"{origin.url}/m.mar", DownloadFailed, limits=limits)
    stop.set()


def test_redirects(place: Place, origin: Origin) -> None:
    origin.answer("/final", archive_bytes(place.root))
    assert place.open(origin.answer("/m.mar", status=302, Location="/final")).manifest.model_name == "probe"
    place.refuse(origin.answer("/loop.mar", status=301, Location="/loop.mar"), DownloadFailed)
    assert origin.seen.count("/loop.mar") == 6
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://169.254.169.254/latest"):
        place.refuse(origin.answer("/away.mar", status=302, Location=target), DownloadFailed)
    place.refuse(origin.answer("/nowhere.mar", status=302), DownloadFailed)


def test_redirects_are_held_to_the_allowed_urls(place: Place, origin: Origin) -> None:
    rules = DownloadRules((rf"{origin.url}/models/.*",))
    origin.answer("/private", archive_bytes(place.root))
    url = origin.answer("/models/m.mar", status=302, Location="/private")
    place.refuse(url, DownloadFailed, rules=rules)
    assert origin.seen == ["/models/m.mar"]
    other = f"{origin.url}/private"
    message = f"Given URL {other} does not match any allowed URL(s)"
    assert place.refuse(other, ModelNotFound, rules=rules) == message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "localhost.",
        "[::1]",
        "0.0.0.0",
        "[::ffff:127.0.0.1]",
        "2130706433",
        "0x7f.1",
        "017700000001",
        "good.example@127.0.0.1",
        "169.254.169.254",
        "10.0.0.1",
        "[fe80::1]",
        "[::]",
    ],
)
def test_private_addresses_get_no_byte(
    place: Place, origin: Origin, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connected(*arguments: object, **options: object) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr("wsgi_ts.archive.download.socket.create_connection", connected)
    port = origin.server.server_address[1]
    rules = DownloadRules(allow_private=False)
    place.refuse(f"http://{host}:{port}/m.mar", DownloadFailed, rules=rules)
    assert origin.seen == []


def test_name_is_resolved_once(place: Place, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second answer of the name server, to another address, is never asked for."""
    asked: list[str] = []

    def resolve(host: str, port: int, **options: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    real = socket.getaddrinfo
    monkeypatch.setattr(
        "wsgi_ts.archive.download.socket.getaddrinfo",
        lambda host, port, *args, **options: (
            resolve(host, port) if host == "models.test" else real(host, port, *args, **options)
        ),
    )
    origin.answer("/m.mar", archive_bytes(place.root))
    port = origin.server.server_address[1]
    assert place.open(f"http://models.test:{port}/m.mar").manifest.model_name == "probe"
    assert asked == ["models.test"]


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example@evil.example/x.mar",
        "http://a b/x.mar",
        "http://good\\@evil/x.mar",
        "http:///x.mar",
        "http://h:99999/x.mar",
        "http://[::1/x.mar",
        "http://h/",
        "file://otherhost/x.mar",
        "file:///nothere/x.mar",
        "file:///tmp",
    ],
)
def test_urls_that_cannot_be_fetched(place: Place, url: str) -> None:
    assert place.refuse(url, DownloadFailed) == f"Failed to download archive from: {url}"


def test_file_url_is_copied_into_the_store(place: Place) -> None:
    source = mar(place.root / "my model.mar")
    opened = place.open(source.as_uri())
    assert opened.downloaded == place.store / "my%20model.mar"
    assert source.exists()


def test_two_registrations_of_one_url(place: Place, origin: Origin) -> None:
    """Both find no file and fetch; one of them wins, and the other removes nothing that is not its own."""
    body = archive_bytes(place.root)
    both = threading.Barrier(2)

    def send(handler: BaseHTTPRequestHandler) -> None:
        both.wait(60)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    origin.answers["/m.mar"] = send
    results: list[object] = []

    def register() -> None:
        try:
            results.append(place.open(f"{origin.url}/m.mar"))
        except ServerError as error:
            results.append(error.message)

    threads = [threading.Thread(target=register) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(isinstance(result, ModelDirectory) for result in results) == [False, True]
    assert "Model file already exists m.mar" in results
    assert [path.name for path in place.store.iterdir()] == ["m.mar"]


def test_store_without_hard_links(place: Place, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("wsgi_ts.archive.download.os.link", no_links)
    url = origin.answer("/m.mar", archive_bytes(place.root))
    assert place.open(url).downloaded == place.store / "m.mar"
    assert [path.name for path in place.store.iterdir()] == ["m.mar"]


def test_wrong_pattern_is_named() -> None:
    with pytest.raises(ValueError, match=r"allowed_urls: 'http\(' is not a regular expression"):
        DownloadRules(("http(",))


def test_a_long_download_says_how_far_it_is(
    place: Place, origin: Origin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wsgi_ts.archive.download._PROGRESS_S", 0.0)
    caplog.set_level("INFO")
    body = mar(place.root / "m.mar").read_bytes()
    place.open(origin.answer("/m.mar?signature=secret", body))
    assert f"Downloading {origin.url}/m.mar: {len(body)} of {len(body)} bytes" in caplog.messages
    assert "secret" not in caplog.text
