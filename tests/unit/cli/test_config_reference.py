"""The reference page of all settings is up to date, and says what the tables say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from wsgi_ts.cli.config_reference import with_tables
from wsgi_ts.models.model_yaml import ModelYaml, TorchrunOptions, parse_model_yaml
from wsgi_ts.settings.config import property_settings
from wsgi_ts.settings.sources import CommandLine, load_config
from wsgi_ts.settings.table import settings_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert text == with_tables(text), "run: python -m wsgi_ts.cli.config_reference docs/configuration.md"


def test_the_command_writes_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    without = re.sub(r"^\| .*\n", "", PAGE.read_text(), flags=re.MULTILINE)
    assert "job_queue_size` |" not in without
    page.write_text(without)
    subprocess.run([sys.executable, "-m", "wsgi_ts.cli.config_reference", str(page)], check=True)
    assert page.read_text() == PAGE.read_text()


def test_every_key_has_one_row() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \|", PAGE.read_text(), re.MULTILINE)
    keys = [row.key for table in (ModelYaml, TorchrunOptions) for row in settings_of(table).values()]
    assert sorted(rows) == sorted([*property_settings(), *keys])


def test_the_printed_files_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "model-store").mkdir()
    for number, text in enumerate(fenced("properties")):
        file = tmp_path / f"{number}.properties"
        file.write_text(text)
        flags = CommandLine(ts_config=str(file), model_store=str(tmp_path / "model-store"))
        assert load_config(flags, {"HOME": str(tmp_path)}).warnings == ()
    (text,) = fenced("yaml")
    assert parse_model_yaml(yaml.safe_load(text)).warnings == ()
