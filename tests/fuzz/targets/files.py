"""What operators write: config.properties, log configurations, workflow specifications."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from wsgi_ts.dataplane.graph import Graph
from wsgi_ts.errors import InvalidDag, InvalidWorkflow
from wsgi_ts.logs.notation import LogConfigError
from wsgi_ts.logs.plan import FORMAT_CLASS
from wsgi_ts.logs.setup import LineFormatter
from wsgi_ts.logs.user_config import load_plan
from wsgi_ts.models.recorded import parse_models as parse_recorded
from wsgi_ts.settings.config import ConfigError
from wsgi_ts.settings.model_entries import parse_models, parse_object
from wsgi_ts.settings.properties import PropertiesError, format_property, parse_properties
from wsgi_ts.settings.sources import CommandLine, load_config
from wsgi_ts.workflows.compile import compile_workflow
from wsgi_ts.workflows.drawing import draw, table
from wsgi_ts.workflows.spec import parse_spec
from wsgi_ts.workflows.svg import svg

_root = tempfile.TemporaryDirectory(prefix="wts-fuzz-")
_ROOT = Path(_root.name)
_RECORD = logging.LogRecord("name", logging.INFO, "path", 1, "a %s", ("message",), None)


def properties(data: bytes) -> None:
    """What is read reads back as itself when it is written."""
    try:
        found = parse_properties(data)
    except PropertiesError as error:
        assert 1 <= error.line <= data.count(b"\n") + data.count(b"\r") + 1
        return
    written = "\n".join(format_property(each.key, each.value) for each in found)
    again = parse_properties(written.encode("ascii"))
    assert [(each.key, each.value) for each in again] == [(each.key, each.value) for each in found]


def config(data: bytes) -> None:
    """A config.properties is refused with its place, or taken, with warnings of one line."""
    file = _ROOT / "config.properties"
    file.write_bytes(data)
    try:
        taken = load_config(CommandLine(ts_config=str(file)), {"TEMP": str(_ROOT), "HOME": str(_ROOT)})
    except ConfigError as error:
        assert str(error)
        return
    assert all(warning.isprintable() or "\t" in warning for warning in taken.warnings)


def log4j2(data: bytes) -> None:
    """A log4j2.xml is refused with its line, or becomes formats that Python's logging can carry out."""
    _log_plan("log4j2.xml", data)


def log_config(data: bytes) -> None:
    """A dictConfig in YAML, or a fileConfig, likewise. The first byte says which."""
    _log_plan("log.ini" if data[:1] in (b"[", b"#") else "log.yaml", data)


def _log_plan(name: str, data: bytes) -> None:
    file = _ROOT / name
    file.write_bytes(data)
    try:
        plan = load_plan(_ROOT, _ROOT, file, {})
    except LogConfigError as error:
        assert str(error).startswith(str(file))
        return
    for row in plan.logging["formatters"].values():
        if row.get("()") == FORMAT_CLASS:
            LineFormatter(row["fmt"], row["datefmt"]).format(_RECORD)


def workflow(data: bytes) -> None:
    """A specification is refused, or is a graph that can be compiled and drawn."""
    try:
        spec = parse_spec(data.decode("utf-8", "replace"))
        compiled = compile_workflow("w", spec)
    except (InvalidDag, InvalidWorkflow) as error:
        assert error.message.isprintable(), error.message
        return
    assert Graph.from_json("w", compiled.graph.to_json()).to_json() == compiled.graph.to_json()
    assert draw(spec) and table(spec) and svg(spec, "w")


def model_entries(data: bytes) -> None:
    """The key `models`, and the models of a snapshot, are refused with a reason or taken."""
    text = data.decode("utf-8", "replace")
    try:
        parse_models(text)
    except ValueError as error:
        assert str(error)
    try:
        parse_recorded(parse_object(text))
    except ValueError as error:
        assert str(error)
