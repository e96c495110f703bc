"""Which plugins a configuration has, and what is said of those that cannot be used."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest

from wsgi_ts.plugins.api import Marked, endpoint, mark_of, plugin
from wsgi_ts.plugins.described import operations_of
from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.probe import examine, with_plugins
from wsgi_ts.settings.config import Config, ConfigError

HELLO = """
from wsgi_ts.plugins import endpoint

@endpoint("hello")
def say(req, resp, ctx):
    return "hello"
"""
AUTH = """
from wsgi_ts.plugins import plugin

@plugin("auth", name="gate")
class Gate:
    def authenticate(self, head): ...
    def authorize(self, principal, action, model): ...
"""


def write(folder: Path, **modules: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(dedent(text))
    return str(folder)


def wheel(folder: Path, name: str, module: str, group: str) -> None:
    """A wheel with one module, `NAME_plugin`, and an entry point for its object `thing`."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.2.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}_plugin.py", dedent(module))
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        archive.writestr(f"{info}/entry_points.txt", f"[wsgi_ts.{group}]\n{name} = {name}_plugin:thing\n")


def found(config: Config) -> dict[str, Found]:
    return {each.name: each for each in examine(config)}


def test_nothing_is_looked_at_where_nothing_is_configured() -> None:
    config = Config()
    assert with_plugins(config) is config


def test_files_packages_and_wheels(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", hello_file=HELLO)
    write(tmp_path / "one" / "a_package", __init__="from a_package.inner import thing", inner="def thing(): pass")
    write(tmp_path / "one" / "own_package", __init__=HELLO.replace("hello", "packed"))
    wheel(tmp_path / "two", "wheeled", "def thing(req, resp, ctx): return 1", "endpoints")
    (tmp_path / "two" / "notes.txt").write_text("no plugin")
    plugins = found(Config(plugins_path=f"{folder}:{tmp_path / 'two'}/*"))
    assert {name: (each.group, each.path, each.error) for name, each in plugins.items()} == {
        "hello": ("endpoints", "hello", ""),
        "packed": ("endpoints", "packed", ""),
        "wheeled": ("endpoints", "wheeled", ""),
    }
    assert plugins["wheeled"].origin == "wheeled 1.2"


def test_the_list_of_names_leaves_out_all_others(tmp_path: Path) -> None:
    folder = write(tmp_path, one=HELLO, two=HELLO.replace("hello", "other"))
    assert set(found(Config(plugins_path=folder, plugins=("other",)))) == {"other"}
    config = with_plugins(Config(plugins_path=folder, plugins=("none",)))
    assert config.warnings == ("plugins: there is no plugin none",)


def test_installed_ones_that_open_something_are_loaded_by_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path, "opens", "def thing(req, resp, ctx): return 1", "endpoints")
    wheel(tmp_path, "listens", "class thing:\n    def server_started(self): pass", "events")
    paths = ":".join(map(str, sorted(tmp_path.glob("*.whl"))))
    monkeypatch.setenv("PYTHONPATH", f"{paths}:{Path(__file__).parents[3]}")
    for path in paths.split(":"):
        monkeypatch.syspath_prepend(path)
    assert set(found(Config())) == {"listens"}
    assert set(found(Config(plugins=("opens",)))) == {"opens"}


def test_by_python_name_the_group_follows_from_the_object(tmp_path: Path) -> None:
    text = """
    class Store:
        def save(self, name, properties): ...
        def last(self): ...
    class Sink:
        def emit(self, samples): ...
    class Policy:
        def key(self, head): ...
    class Listener:
        def worker_died(self): ...
    class What: ...
    """
    folder = write(tmp_path, things=text)
    names = ("Store", "Sink", "Policy", "Listener", "What", "Missing")
    plugins = found(Config(plugins_path=folder, plugin=tuple(f"things:{name}" for name in names)))
    groups = {name: each.group for name, each in plugins.items() if not each.error}
    assert groups == {"Store": "snapshot", "Sink": "metrics", "Policy": "batching", "Listener": "events"}
    assert "decorate it" in plugins["What"].error
    assert plugins["Missing"].error == "module things has no Missing"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("WSGI_TS_API = 2\n" + HELLO, "bad is written for plugin API 2, this server has 1"),
        ("from wsgi_ts.plugins import plugin\n@plugin('auth')\nclass A: ...", "needs authenticate, authorize"),
        ("from wsgi_ts.plugins import endpoint\n@endpoint('a/b')\ndef a(): ...", "one path segment is wanted"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_used_is_warned_of(tmp_path: Path, text: str, error: str) -> None:
    config = Config(plugins_path=write(tmp_path, bad=text, good=HELLO))
    if "auth" in text:
        with pytest.raises(ConfigError, match=error):
            with_plugins(config)
        return
    checked = with_plugins(config)
    assert error in checked.warnings[0]
    assert [row["name"] for row in checked.found_plugins if not row["error"]] == ["hello"]
    with pytest.raises(ConfigError) as strict:
        with_plugins(dataclasses.replace(config, plugins_strict=True))
    assert error in str(strict.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "import os, sys; print('no luck', file=sys.stderr); os._exit(1)",
            "it ended the process that imported it: no luck",
        ),
        ("while True: pass", "no end within 4 s"),
        ("import re; re.match('(a+)+b', 'a' * 60)", "no end within 4 s"),  # does not let other threads run
        ("class Stop(BaseException): pass\nraise Stop('here')", "Stop: here"),
    ],
)
def test_one_that_hangs_or_ends_the_process_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, fault: str
) -> None:
    monkeypatch.setattr("wsgi_ts.plugins.probe.LIMIT_S", 4.0)
    config = Config(plugins_path=write(tmp_path, bad=text, good=HELLO), plugin=("bad:thing",))
    checked = with_plugins(config)
    assert [row["name"] for row in checked.found_plugins if not row["error"]] == ["hello"]
    named, file = checked.warnings[1], checked.warnings[0]
    assert file == f"plugin bad ({tmp_path}/bad.py): {fault}" and "plugin thing (key plugin): " in named
    with pytest.raises(ConfigError, match=fault[:10]):
        with_plugins(dataclasses.replace(config, plugins_strict=True))


@pytest.mark.parametrize(
    ("last", "fault"), [("import time; time.sleep(60)", "no end within 4 s"), ("raise SystemExit(0)", "SystemExit: 0")]
)
def test_a_store_that_hangs_costs_its_last_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, fault: str
) -> None:
    monkeypatch.setattr("wsgi_ts.plugins.probe.SNAPSHOT_LIMIT_S", 4.0)
    text = f"class Store:\n    def save(self, name, properties): ...\n    def last(self):\n        {last}\n"
    config = Config(plugins_path=write(tmp_path, kept=text), plugin=("kept:Store",))
    checked = with_plugins(config)
    problem = f"the last snapshot cannot be read: {fault}"
    assert checked.warnings == (f"plugin Store (key plugin): {problem}",)
    (row,) = checked.found_plugins
    assert (row["error"], row["problem"]) == ("", problem)
    with pytest.raises(ConfigError, match="the last snapshot"):
        with_plugins(dataclasses.replace(config, plugins_strict=True))


def test_two_endpoints_with_one_path_stop_the_start(tmp_path: Path) -> None:
    config = Config(plugins_path=write(tmp_path, one=HELLO, two=HELLO))
    with pytest.raises(ConfigError, match='Multiple plugins found for endpoint "hello"'):
        with_plugins(config)


def test_a_jar_gets_a_line_and_a_missing_folder_too(tmp_path: Path) -> None:
    (tmp_path / "model-ready.jar").write_bytes(b"PK")
    config = with_plugins(Config(plugins_path=f"{tmp_path}:{tmp_path}/none"))
    jar, folder = config.warnings
    assert "model-ready.jar is a plugin for Java" in jar and "wsgi-ts plugin new endpoint NAME" in jar
    assert f"plugins_path: no such folder: {tmp_path}/none" in folder


def test_a_file_with_the_name_of_something_installed(tmp_path: Path) -> None:
    (each,) = examine(Config(plugins_path=write(tmp_path, json=HELLO)))
    assert "give it another name" in each.error


def test_who_may_ask_is_said_by_tokens_or_plugins(tmp_path: Path) -> None:
    config = with_plugins(Config(plugins_path=write(tmp_path, gate=AUTH)))
    assert config.auth_plugins and not config.token_authorization
    both = dataclasses.replace(config, disable_token_authorization=False)
    assert both.token_authorization
    assert Config.from_json(config.to_json()) == config


def test_marks() -> None:
    class App:
        __slots__ = ()

    wrapped = endpoint("app", type="metrics")(App())
    assert isinstance(wrapped, Marked) and wrapped.mark.type == "metrics"

    @plugin("events")
    class Base: ...

    class Derived(Base): ...

    assert mark_of(Base) is not None and mark_of(Derived) is None and mark_of(Base()) is None
    with pytest.raises(ValueError, match="group 'event' is none of"):
        plugin("event")
    with pytest.raises(ValueError, match="type 'infer' is none of"):
        endpoint("a", type="infer")


class _Documented:
    """Of the class.

    At length.
    """

    def do_get(self) -> None:
        """Of the method,
        on two lines."""

    def do_put(self) -> None: ...


class _Fallback:
    def on_get(self) -> None:
        """Of GET."""

    def on_request(self) -> None: ...


def test_an_endpoint_is_described_by_its_docstrings() -> None:
    assert operations_of(_Documented, "p") == (
        {"method": "get", "summary": "Of the method, on two lines.", "description": "Of the method,\non two lines."},
        {"method": "put", "summary": "Of the class.", "description": "Of the class.\n\nAt length."},
    )
    summaries = {row["method"]: row["summary"] for row in operations_of(_Fallback, "p")}
    nothing = "Endpoint p of a plugin."
    assert summaries == {"get": "Of GET.", **dict.fromkeys(("post", "put", "delete", "patch"), nothing)}
    # The text of the class of an app is not about what it serves.
    assert {row["summary"] for row in operations_of(Config(), "p")} == {nothing}
