"""Keys, their expiry under both clocks, and whom a listener answers."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.errors import CrossSiteRequest, HostNotAllowed, InvalidKey
from wsgi_ts.http.head import Head
from wsgi_ts.instance.run_directory import write_json
from wsgi_ts.security import access as access_module
from wsgi_ts.security.access import Access, TokenTable, scope_of
from wsgi_ts.security.tokens import API, INFERENCE, MANAGEMENT, KeyFileError, KeyRing
from wsgi_ts.settings.address import Address
from wsgi_ts.settings.config import Config

ON = Config(disable_token_authorization=False)
PREFIX = f"wsgi-ts-{'0' * 24}{os.getpid():08x}"


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create(PREFIX)
    yield board
    Board.unlink(PREFIX)
    board.close()


@pytest.fixture
def ring(tmp_path: Path, board: Board) -> KeyRing:
    """Keys of an hour, published as the supervisor does."""

    def publish(keys: dict[str, object]) -> None:
        write_json(tmp_path / "tokens.json", keys)
        board.bump_token_epoch()

    ring = KeyRing(tmp_path, 60.0, publish)
    ring.create()
    return ring


def key(ring: KeyRing, scope: str) -> str:
    text: str = json.loads(ring.path.read_text())[scope]["key"]
    return text


def head(path: str, token: str = "", host: str = "localhost") -> Head:
    line = f"Authorization: Bearer {token}\r\n" if token else ""
    return Head(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{line}X: y\r\n\r\n".encode())


class Clocks:
    """Stands in for the module's `time`."""

    def __init__(self) -> None:
        self.wall, self.running = time.time(), time.monotonic()

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.running

    def monotonic_ns(self) -> int:
        return int(self.running * 1e9)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(access_module, "time", clocks)
    return clocks


# Scopes


@pytest.mark.parametrize(
    ("kinds", "path", "scope"),
    [
        ("inference", "/predictions/m", INFERENCE),
        ("inference", "/token", INFERENCE),
        ("inference", "/", None),
        ("inference", "/api-description/", None),
        ("inference", "/api-description/x", INFERENCE),
        ("inference", "/readyz", None),
        ("inference", "/livez/", None),
        ("inference", "/readyz/x", INFERENCE),
        ("inference management", "/startupz", None),
        ("inference management", "/v2/models/m/infer", INFERENCE),
        ("inference management", "/v2/repository/models/m/load", MANAGEMENT),
        ("inference management", "/v2/repository/index", MANAGEMENT),
        ("inference management", "/v2//repository/index", INFERENCE),
        ("management", "/models", MANAGEMENT),
        ("management", "/token", API),
        ("management", "/token/", API),
        ("management", "/token/x", MANAGEMENT),
        ("management", "//token", MANAGEMENT),
        ("management", "/predictions/m", MANAGEMENT),
        ("inference management", "/predictions/m/1/rest", INFERENCE),
        ("inference management", "/m/predict", INFERENCE),
        ("inference management", "/models/m/invoke", INFERENCE),
        ("inference management", "/models/invoke", MANAGEMENT),
        ("inference management", "/models/predict", MANAGEMENT),
        ("inference management", "/models/m/predict", MANAGEMENT),
        ("inference management", "/v1/predict", MANAGEMENT),
        ("inference management", "/v1/models/m", MANAGEMENT),
        ("inference management", "/v1/models/m:predict", INFERENCE),
        ("inference management", "//models/m", MANAGEMENT),
        ("inference management", "/unknown", MANAGEMENT),
        ("inference management", "/token", API),
    ],
)
def test_scope_of_a_path(kinds: str, path: str, scope: str | None) -> None:
    assert scope_of(kinds.split(), path) == scope


def test_which_listeners_have_a_gate() -> None:
    everywhere = Address("http", "0.0.0.0", 8081)
    assert not Access.is_limited(["inference"], Config())
    assert Access.is_limited(["management"], Config())
    assert not Access.is_limited(["management"], Config(management_address=Address("unix", path="/x")))
    assert not Access.is_limited(["metrics"], ON)
    assert Access.is_limited(["inference"], ON)
    assert Access.is_limited(["inference"], Config(management_address=everywhere))
    assert not Access.is_limited(["inference"], Config(management_address=everywhere, disable_token_authorization=True))


# Keys and marks


def test_a_head_that_passed_is_marked_and_shows_no_token(tmp_path: Path, board: Board, ring: KeyRing) -> None:
    access = Access(["inference"], ON, tmp_path, board)
    good, bad = head("/ping", key(ring, INFERENCE)), head("/ping", key(ring, MANAGEMENT))
    assert not access.has_admitted(good)
    assert access.refusal_of(good) is None
    assert access.has_admitted(good)
    assert good.raw == b"GET /ping HTTP/1.1\r\nHost: localhost\r\nX: y\r\n\r\n"
    assert isinstance(access.refusal_of(bad), InvalidKey)
    assert not access.has_admitted(bad)
    other = Access(["management"], ON, tmp_path, board)
    assert not other.has_admitted(good)


def test_a_renewal_takes_marks_back_without_a_refresh_in_between(tmp_path: Path, board: Board, ring: KeyRing) -> None:
    access = Access(["inference"], ON, tmp_path, board)
    old = head("/ping", key(ring, INFERENCE))
    assert access.refusal_of(old) is None
    ring.renew(INFERENCE)
    assert not access.has_admitted(old)
    new = head("/ping", key(ring, INFERENCE))
    assert access.refusal_of(new) is None
    assert access.has_admitted(new) and not access.has_admitted(old)
    assert access.refusal_of(old) is not None


@pytest.mark.parametrize("wall_step_s", [0.0, -86400.0, 3600.0 * 24])
def test_expiry_whatever_the_wall_clock_does(
    tmp_path: Path, board: Board, ring: KeyRing, clocks: Clocks, wall_step_s: float
) -> None:
    access = Access(["inference"], ON, tmp_path, board)
    mine = head("/ping", key(ring, INFERENCE))
    assert access.refusal_of(mine) is None
    clocks.running += 3500
    clocks.wall += 3500
    access.refresh(clocks.monotonic_ns())
    assert access.has_admitted(mine)
    clocks.wall += wall_step_s
    clocks.running += 101
    clocks.wall += 101
    access.refresh(clocks.monotonic_ns())
    assert not access.has_admitted(mine)
    assert isinstance(access.refusal_of(mine), InvalidKey)


def test_a_wall_clock_set_forward_ends_a_key_at_once(
    tmp_path: Path, board: Board, ring: KeyRing, clocks: Clocks
) -> None:
    access = Access(["inference"], ON, tmp_path, board)
    mine = head("/ping", key(ring, INFERENCE))
    assert access.refusal_of(mine) is None
    clocks.wall += 7200
    clocks.running += 1
    access.refresh(clocks.monotonic_ns())
    assert not access.has_admitted(mine) and access.refusal_of(mine) is not None


def test_the_api_key_does_not_expire(tmp_path: Path, board: Board, ring: KeyRing, clocks: Clocks) -> None:
    access = Access(["management"], ON, tmp_path, board)
    clocks.wall += 10**8
    clocks.running += 10**8
    assert access.refusal_of(head("/token", key(ring, API))) is None


def test_nothing_published_lets_nobody_pass(tmp_path: Path, board: Board) -> None:
    access = Access(["inference"], ON, tmp_path, board)
    assert isinstance(access.refusal_of(head("/ping", "x")), InvalidKey)


def test_the_time_of_a_check_does_not_depend_on_how_much_is_right(tmp_path: Path, board: Board, ring: KeyRing) -> None:
    """The sums are compared, in constant time: the first wrong character must not be told by the clock."""
    table = TokenTable(tmp_path, board)
    table.refresh()
    right = key(ring, INFERENCE)
    candidates = {"first": f"Bearer {'A' if right[0] != 'A' else 'B'}{right[1:]}", "last": f"Bearer {right[:-2]}__"}
    times: dict[str, list[int]] = {name: [] for name in candidates}
    for _ in range(5000):
        for name, text in candidates.items():
            started = time.perf_counter_ns()
            table.accepts(INFERENCE, text)
            times[name].append(time.perf_counter_ns() - started)
    medians = [statistics.median(each) for each in times.values()]
    assert abs(medians[0] - medians[1]) < 0.2 * max(medians)


# The file


def test_the_file_is_never_there_half_written_or_open(tmp_path: Path, ring: KeyRing) -> None:
    for _ in range(5):
        before = ring.path.stat().st_ino
        ring.renew(MANAGEMENT)
        status = ring.path.stat()
        assert status.st_mode & 0o777 == 0o600 and status.st_ino != before
    assert {path.name for path in tmp_path.iterdir()} == {"key_file.json", "tokens.json"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "missing", 60.0, lambda keys: None)
    with pytest.raises(KeyFileError, match=r"missing/key_file\.json .* cannot be written: No such file"):
        ring.create()


def test_a_renewal_that_cannot_be_written_leaves_the_old_key(
    tmp_path: Path, board: Board, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, old = TokenTable(tmp_path, board), key(ring, INFERENCE)
    with monkeypatch.context() as patch:
        replace = os.replace

        def refuse(source: Path, target: Path) -> None:
            if target == ring.path:
                raise OSError(30, "Read-only file system")
            replace(source, target)

        patch.setattr(os, "replace", refuse)
        with pytest.raises(KeyFileError, match="Read-only"):
            ring.renew(INFERENCE)
    table.refresh()
    assert key(ring, INFERENCE) == old and table.accepts(INFERENCE, f"Bearer {old}")
    assert {path.name for path in tmp_path.iterdir()} == {"key_file.json", "tokens.json"}


def test_a_key_file_of_another_instance_is_left(tmp_path: Path, ring: KeyRing) -> None:
    other = KeyRing(tmp_path, 60.0, lambda keys: None)
    other.create()
    ring.remove()
    assert other.path.exists()
    other.remove()
    assert not other.path.exists()


# Hosts


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("localhost", True),
        ("LocalHost:8081", True),
        ("127.0.0.1:8081", True),
        ("127.1.2.3", True),
        ("[::1]:8081", True),
        ("", True),
        ("attacker.example:8081", False),
        ("localhost.attacker.example", False),
        ("127.0.0.1.attacker.example", False),
        ("10.0.0.1", False),
        ("localhost,attacker.example", False),
    ],
)
def test_host_of_a_management_request_without_tokens(tmp_path: Path, board: Board, host: str, passes: bool) -> None:
    access = Access(["management"], Config(), tmp_path, board)
    refusal = access.refusal("/models", {"HTTP_HOST": host})
    assert refusal is None if passes else isinstance(refusal, HostNotAllowed)


def test_predictions_on_a_shared_address_take_any_host(tmp_path: Path, board: Board) -> None:
    access = Access(["inference", "management"], Config(), tmp_path, board)
    assert access.refusal("/predictions/m", {"HTTP_HOST": "any.example"}) is None
    assert isinstance(access.refusal("/models", {"HTTP_HOST": "any.example"}), HostNotAllowed)


OWN = {"HTTP_ORIGIN": "http://localhost:8081"}
OTHER = {"HTTP_ORIGIN": "https://page.example"}
SITE = "HTTP_SEC_FETCH_SITE"


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ({}, True),  # curl, and all other programs
        (OWN, True),
        ({**OWN, SITE: "same-origin"}, True),
        ({SITE: "none"}, True),
        ({**OTHER, SITE: "same-origin"}, True),  # a proxy has changed the host
        ({**OTHER, "HTTP_X_FORWARDED_HOST": "page.example"}, True),
        (OTHER, False),
        ({**OTHER, SITE: "cross-site"}, False),
        ({SITE: "cross-site"}, False),
        ({"HTTP_ORIGIN": "http://localhost:3000", SITE: "same-site"}, False),
        ({"HTTP_ORIGIN": "http://localhost:3000"}, False),
        ({"HTTP_ORIGIN": "null"}, False),
        ({**OWN, SITE: "cross-site"}, False),
        ({**OWN, SITE: "anything-new"}, False),
    ],
)
def test_a_page_of_another_site_changes_nothing(
    tmp_path: Path, board: Board, said: dict[str, str], passes: bool
) -> None:
    everywhere = Address("http", "0.0.0.0", 8081)
    asked = {"HTTP_HOST": "localhost:8081", **said}
    for config in (Config(), Config(management_address=everywhere, disable_token_authorization=True)):
        assert Access.is_limited(["management"], config)
        access = Access(["inference", "management"], config, tmp_path, board)
        for method, path in (
            ("POST", "/models"),
            ("PUT", "/models/m"),
            ("DELETE", "/models/m"),
            ("POST", "/v2/repository/models/m/unload"),
        ):
            refusal = access.refusal(path, {**asked, "REQUEST_METHOD": method})
            assert refusal is None if passes else isinstance(refusal, CrossSiteRequest), (method, path)
        for method, path in (("GET", "/models"), ("OPTIONS", "/models/m"), ("POST", "/predictions/m")):
            assert access.refusal(path, {**asked, "REQUEST_METHOD": method}) is None


def test_an_origin_that_cors_allows_may_change_something(tmp_path: Path, board: Board) -> None:
    asked = {**OTHER, SITE: "cross-site", "HTTP_HOST": "localhost:8081", "REQUEST_METHOD": "PUT"}
    for origin, passes in (("https://page.example", True), ("*", True), ("https://other.example", False)):
        access = Access(["management"], Config(cors_allowed_origin=origin), tmp_path, board)
        assert (access.refusal("/models/m", asked) is None) is passes


def test_with_tokens_any_host_will_do(tmp_path: Path, board: Board, ring: KeyRing) -> None:
    access = Access(["management"], ON, tmp_path, board)
    assert access.refusal_of(head("/models", key(ring, MANAGEMENT), host="any.example")) is None


def test_a_plugin_in_the_place_of_an_open_page_is_not_open(board: Board, ring: KeyRing, tmp_path: Path) -> None:
    access = Access(("management",), ON, tmp_path, board)
    assert access.refusal_of(head("/console")) is None
    access.plugin_roots = frozenset({"console", "docs"})
    for path in ("/console", "/docs"):
        assert isinstance(access.refusal_of(head(path)), InvalidKey)
        assert access.refusal_of(head(path, key(ring, MANAGEMENT))) is None
    both = Access(("inference", "management"), ON, tmp_path, board)
    both.plugin_roots = both.inference_roots = frozenset({"docs"})
    assert isinstance(both.refusal_of(head("/docs", key(ring, MANAGEMENT))), InvalidKey)
    assert both.refusal_of(head("/docs", key(ring, INFERENCE))) is None
