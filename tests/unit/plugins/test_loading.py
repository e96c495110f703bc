"""What a process does with plugins that hang or exit where they begin, and with calls that do."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.eventually import eventually

from wsgi_ts.plugins.found import Found, PluginError
from wsgi_ts.plugins.report import PluginReport, counts
from wsgi_ts.plugins.snapshot import Store
from wsgi_ts.plugins.threads import LimitedCalls, within
from wsgi_ts.settings.config import Config
from wsgi_ts.web.middleware import wrapped


def hang(*_: object) -> None:
    while True:
        pass


def leave(*_: object) -> None:
    raise SystemExit(0)


class Begins:
    """The plugins of a process, named by the attributes of a module."""

    def __init__(self, run_dir: Path, group: str, **plugins: Any) -> None:
        module = sys.modules["begun"] = ModuleType("begun")
        vars(module).update(plugins)
        rows = [Found(name, group, f"begun:{name}", "test").row() for name in plugins]
        (run_dir / "plugins").mkdir()
        self.config = Config(found_plugins=tuple(rows))
        self.beats = 0
        self.report = PluginReport(run_dir, "test", self._beat)
        self._run_dir = run_dir

    def _beat(self) -> None:
        self.beats += 1

    def counted(self, **errors: int) -> None:
        eventually(lambda: counts(self._run_dir, "errors") == errors, within=20, what=f"counts {errors}")


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    # What does not hang must not meet it on a busy machine either.
    monkeypatch.setattr("wsgi_ts.plugins.report.LOAD_LIMIT_S", 4)


def test_what_hangs_or_exits_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hung: list[int] = []

    class Hangs:
        def __init__(self) -> None:
            hung.append(1)
            hang()

    class Exits:
        __init__ = leave

    class Fine:
        pass

    place = Begins(tmp_path, "events", hangs=Hangs, exits=Exits, fine=Fine)
    made = list(place.report.instances(place.config, "events"))
    assert [found.name for found, _ in made] == ["fine"]
    assert "Plugin hangs: TimeoutError: no end within 4 s; it is left out" in caplog.text
    assert "Plugin exits: SystemExit: 0; it is left out" in caplog.text
    assert place.beats == 6, "who waits for this process hears of it after each step"
    place.counted(hangs=1, exits=1, fine=0)
    # A second time it would take as long again.
    assert len(list(place.report.instances(place.config, "events"))) == 1
    assert hung == [1]
    place.counted(hangs=1, exits=2, fine=0)


def test_middleware_that_hangs_or_exits_where_it_is_made(tmp_path: Path) -> None:
    place = Begins(tmp_path, "middleware", hangs=hang, exits=leave)

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return [b"answer"]

    assert wrapped(app, place.config, place.report) is app
    place.counted(hangs=1, exits=1)


def test_a_store_that_cannot_be_made_is_tried_again_where_it_did_not_hang(tmp_path: Path) -> None:
    saved: list[str] = []

    class Moody:
        tries = 0

        def __init__(self) -> None:
            Moody.tries += 1
            if Moody.tries == 1:
                raise ConnectionError("no network")

        def save(self, name: str, properties: dict[str, str]) -> None:
            saved.append(name)

    place = Begins(tmp_path, "snapshot", moody=Moody)
    store = Store(place.config, Found(**place.config.found_plugins[0]), place.report)
    assert not store.keep("first", {})
    assert store.keep("second", {}) and saved == ["second"]
    place.counted(moody=1)


def test_a_call_that_is_late_or_exits() -> None:
    with pytest.raises(TimeoutError, match=r"no end within 0\.1 s"):
        within(0.1, hang)
    eventually(lambda: "plugin call" not in {each.name for each in threading.enumerate()}, within=20, what="its end")
    with pytest.raises(PluginError, match="SystemExit: 0"):
        within(60.0, leave)


def test_while_a_call_is_stuck_no_other_is_made() -> None:
    calls, go = LimitedCalls("test"), threading.Event()
    with pytest.raises(TimeoutError):
        calls.make(0.1, go.wait)
    assert calls.is_stuck
    go.set()
    eventually(lambda: not calls.is_stuck, within=20, what="the call's end")
    with pytest.raises(PluginError, match="SystemExit"):
        calls.make(60.0, leave)
    calls.make(60.0, lambda: None)
