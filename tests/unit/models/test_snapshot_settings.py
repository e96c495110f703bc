"""What is written into a snapshot reads back as the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.models.recorded import recorded_models
from wsgi_ts.settings.config import Config, property_settings
from wsgi_ts.settings.given import given_settings
from wsgi_ts.settings.properties import format_property, parse_properties

#: Texts of which every kind of value takes at least two.
_TEXTS = (
    "package.module:attribute",
    "3",
    "true",
    "false",
    "7",
    "17",
    "/some/päth: with=signs",
    "/other",
    "http://127.0.0.1:7777",
    "unix:/tmp/some.sock",
    '{"a b": {"1.0": {"minWorkers": 2}}}',
    "https://a\\.example/.*,file://#.*",
    "fixed",
    "prometheus",
    "log",
    "json",
    "0.5",
    "none",
    "body",
    "optional",
)


def another_value(key: str, default: Any) -> Any:
    """A value that the key takes and that is not its default."""
    for text in _TEXTS:
        try:
            value = property_settings()[key].kind.parse(text)
        except ValueError:
            continue
        if value != default:
            return value
    raise AssertionError(f"no text for {key}: add one")


def test_every_setting_reads_back_as_it_was() -> None:
    default = Config()
    keys = [key for key in property_settings() if key not in ("load_models", "model_snapshot")]
    changed = {key: another_value(key, getattr(default, key)) for key in keys}
    config = Config(**changed, initial_models="a=b.mar, c.mar")
    text = "\n".join(format_property(key, value) for key, value in given_settings(config).items())
    assert text.isascii()
    rows = {row.key: row.value for row in parse_properties(text.encode())}
    assert rows.pop("load_models") == "a=b.mar, c.mar"
    assert {key: property_settings()[key].kind.parse(value) for key, value in rows.items()} == changed


def test_defaults_are_not_frozen() -> None:
    assert set(given_settings(Config())) <= {key for key in property_settings() if key.endswith("_address")}


@pytest.mark.parametrize(
    "value", ["", "plain", " leading", "trailing ", "a\\b", "tab\t\nline\r\f", "k=v: #!", "naïve \U0001f600", "\\u0041"]
)
def test_a_property_reads_back_as_it_was(value: str) -> None:
    (row,) = parse_properties(format_property("some.key", value).encode())
    assert (row.key, row.value) == ("some.key", value)


def test_the_default_version_is_restored_first(tmp_path: Path) -> None:
    for name in ("a.mar", "b.mar"):
        (tmp_path / name).touch()
    versions = {"1": {"marName": "a.mar"}, "2": {"marName": "b.mar", "defaultVersion": True}}
    snapshot = {"modelCount": 2, "models": {"m": versions}}
    found = recorded_models(Config(model_store=tmp_path, model_snapshot=snapshot))
    assert [(each.version, each.numbers) for each in found] == [("2", {}), ("1", {})]
