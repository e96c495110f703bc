"""URLs that archives are fetched from, and what handlers and clients get into logs and metrics."""

from __future__ import annotations

import http.client
import re
from urllib.parse import urlsplit

from wsgi_ts.archive.download import DownloadRules, _checked_parts, _Refused, is_fetched
from wsgi_ts.batcher.template.output import MAX_LINE_BYTES, LineSplitter
from wsgi_ts.logs.text import escape_controls, safe_target, safe_text
from wsgi_ts.metrics.exposition import Renderer
from wsgi_ts.metrics.reported import MAX_SERIES, PROMETHEUS_MODE, ModelMetrics, ReportedMetrics, parse_line
from wsgi_ts.metrics.specification import load_specification

_RULES = DownloadRules((r"https://models\.example\.org/[a-z/]*\.mar",))
_SAMPLE = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-zA-Z_]\w*="([^"\\\n]|\\["\\n])*",?)*\})? [-+.\w]+')


def url(data: bytes) -> None:
    """What was checked is what is connected to: the host has one meaning, and an allowed one is the allowed one."""
    text = data.decode("utf-8", "surrogateescape")
    allowed = _RULES.match(text)
    is_fetched(text, _RULES)
    try:
        parts = _checked_parts(text)
        port = parts.port
    except (_Refused, ValueError):
        return
    assert "@" not in parts.netloc and not re.search(r"[\s\\]", text)
    if parts.scheme != "file":
        connection = http.client.HTTPConnection(parts.hostname or "", port or 80)
        assert connection.host == (parts.hostname or "").strip("[]")
    if allowed:
        assert parts.hostname == "models.example.org", text
        assert urlsplit(text).hostname == "models.example.org"


def metric_line(data: bytes) -> None:
    """Lines of a handler's output: cut to size, and never more series or another syntax than Prometheus takes."""
    splitter = LineSplitter()
    half = len(data) // 2
    lines = splitter.feed(data[:half]) + splitter.feed(data[half:]) + splitter.finish()
    metrics, summed = ModelMetrics.load(None, PROMETHEUS_MODE, True), ReportedMetrics(load_specification(None))
    for line in lines:
        assert len(line) <= MAX_LINE_BYTES and "\n" not in line
        reported = parse_line(line)
        if reported is not None:
            metrics.record(reported)
    summed.apply(metrics.take_updates())
    text = Renderer().render(summed.families())
    assert text.count("\n") < (MAX_SERIES + 1) * 100
    for line in text.splitlines():
        assert line.startswith("# ") or _SAMPLE.fullmatch(line), line


def log_text(data: bytes) -> None:
    """One event is one line, whatever it says."""
    text = data.decode("utf-8", "surrogateescape")
    for line in (escape_controls(text), safe_text(text)):
        assert len(line.splitlines()) <= 1, line
        assert not any(ord(character) < 32 and character != "\t" for character in line)
    target = safe_target(data.decode("latin-1"))
    assert target.isascii() and target.isprintable() and '"' not in target
