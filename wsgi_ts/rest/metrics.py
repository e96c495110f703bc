"""The metrics API: `GET /metrics` in Prometheus' text format, as TorchServe writes it.

In the default mode (`metrics_mode=log`) the metrics go to the log files and this answer is empty.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import falcon

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.board import Board

if TYPE_CHECKING:
    from wsgi_ts.rest.apps import WebSettings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Families of answers by status class and the word of a web worker's row that counts them.
RESPONSE_FAMILIES = {
    "Requests2XX": layout.WebWord.RESPONSES_2XX,
    "Requests4XX": layout.WebWord.RESPONSES_4XX,
    "Requests5XX": layout.WebWord.RESPONSES_5XX,
}
#: Families of a model version: unit and the word of its row.
MODEL_FAMILIES = {
    "ts_inference_requests_total": ("Count", layout.ModelWord.REQUESTS),
    "ts_inference_latency_microseconds": ("Microseconds", layout.ModelWord.LATENCY_US),
    "ts_queue_latency_microseconds": ("Microseconds", layout.ModelWord.QUEUE_US),
}
#: Values from here on, and below the other one, are written with an exponent.
_EXPONENT_FROM = 1e7
_EXPONENT_BELOW = 1e-3


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, type and unit, and a value for each set of labels."""

    name: str
    unit: str
    kind: str = "counter"
    samples: list[tuple[dict[str, str], float]] = field(default_factory=list)


def render(families: Iterable[Family], names: Collection[str] = ()) -> str:
    """The text of the answer.

    Args:
        families: the metrics.
        names: only these, when there are any.
    """
    return "".join(_family_text(family) for family in families if not names or family.name in names)


def _family_text(family: Family) -> str:
    lines = [
        f"# HELP {family.name} Torchserve prometheus {family.kind} metric with unit: {family.unit}",
        f"# TYPE {family.name} {family.kind}",
    ]
    for labels, value in family.samples:
        # TorchServe's client ends the label list with a comma, and dashboards' regular expressions expect it.
        text = "".join(f'{name}="{_escape(label)}",' for name, label in labels.items())
        lines.append(f"{family.name}{{{text}}} {java_double(value)}")
    return "\n".join(lines) + "\n"


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def java_double(value: float) -> str:
    """A number as Java prints a double: `7.0`, `1.5E7`."""
    value = float(value)
    if value == 0 or _EXPONENT_BELOW <= abs(value) < _EXPONENT_FROM:
        return repr(value)
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}[str(value)]
    sign, digits, _ = Decimal(repr(value)).normalize().as_tuple()
    mantissa = "".join(map(str, digits))
    exponent = Decimal(repr(value)).adjusted()
    return f"{'-' if sign else ''}{mantissa[0]}.{mantissa[1:] or '0'}E{exponent}"


def read_families(board: Board, routes: Mapping[str, Any], hostname: str) -> list[Family]:
    """Reads the counters of all processes.

    A counter without a count is left out, as TorchServe knows a label only from its first use on.

    Args:
        board: the instance's board.
        routes: the published registry, which says which row belongs to which model version.
        hostname: the value of the host label.
    """
    words = board.words
    families = []
    for name, web_word in RESPONSE_FAMILIES.items():
        count = sum(words[board.web_row(row) + web_word] for row in range(layout.MAX_WEB_ROWS))
        labels = {"Level": "Host", "Hostname": hostname}
        families.append(Family(name, "Count", samples=[(labels, count)] if count else []))
    for name, (unit, model_word) in MODEL_FAMILIES.items():
        family = Family(name, unit)
        for model_name, model in routes.get("models", {}).items():
            for version, entry in model["versions"].items():
                rows = (board.model_row(batcher, entry["index"]) for batcher in range(layout.MAX_BATCHERS))
                total = sum(words[row + model_word] for row in rows)
                if total:
                    labels = {"model_name": model_name, "model_version": version, "hostname": hostname}
                    family.samples.append((labels, total))
        families.append(family)
    return families


class Metrics:
    """`/metrics`, with any method."""

    def __init__(self, settings: WebSettings) -> None:
        """Opens nothing yet: the process that answers maps the board, and may be a fork of this one."""
        self._in_logs = settings.config.metrics_mode == "log"
        self._prefix = settings.prefix
        self._routes_file = Path(settings.run_dir) / "routes.json"
        self._board: Board | None = None

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with the counters, or those named by `name[]`."""
        resp.set_header("content-type", CONTENT_TYPE)
        if self._in_logs:
            resp.data = b""
            return
        wanted: str | list[str] = req.params.get("name[]", [])
        names = {wanted} if isinstance(wanted, str) else set(wanted)
        resp.data = render(self._read(), names).encode()

    def _read(self) -> list[Family]:
        if self._board is None:
            self._board = Board.attach(self._prefix)
        routes = json.loads(self._routes_file.read_text())
        return read_families(self._board, routes, socket.gethostname())


def add_routes(app: falcon.App[Any, Any], settings: WebSettings) -> None:
    """Gives `app` the metrics route.

    Args:
        app: the app of a metrics (or combined) listener.
        settings: the instance.
    """
    app.add_route("/metrics", Metrics(settings))
