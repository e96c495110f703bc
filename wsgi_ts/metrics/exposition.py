"""How metrics are written: Prometheus' text format and the lines of the metrics logs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import field
from decimal import Decimal

from wsgi_ts.metrics.specification import MetricSpec
from wsgi_ts.quick_dataclass import dataclass

#: Values from here on, and below the other one, are written with an exponent.
_EXPONENT_FROM = 1e7
_EXPONENT_BELOW = 1e-3


@dataclass(slots=True)
class Histogram:
    """The values of a histogram for one set of labels.

    Attributes:
        bounds: upper bounds of the buckets, in the metric's unit.
        counts: how many values fell into each bucket, and above the last one.
        total: the sum of all values.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float


@dataclass(slots=True)
class Family:
    """One metric with its values.

    Attributes:
        help: what it is, for people.
        samples: for the labels' values a number, or a Histogram.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    samples: dict[tuple[str, ...], float | Histogram] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: MetricSpec) -> Family:
        """A metric of metrics.yaml, without values."""
        text = f"Torchserve prometheus {spec.kind} metric with unit: {spec.unit}"
        return cls(spec.name, spec.kind, text, spec.dimensions)


class Renderer:
    """Writes the answer of `/metrics` again and again: of a model that nobody asks the text is kept.

    A server with many models has ten thousand lines, of which few have changed since the last time. Used by one thread
    at a time.
    """

    def __init__(self) -> None:
        #: Of each metric, and each set of labels' values: the sample, and its lines.
        self._kept: dict[str, dict[tuple[str, ...], tuple[float | Histogram, str]]] = {}

    def render(self, families: Iterable[Family], names: Collection[str] = ()) -> str:
        """The text, of the metrics of these names alone, if any are given."""
        return "".join(self._family_text(family) for family in families if not names or family.name in names)

    def _family_text(self, family: Family) -> str:
        parts = [_heading(family)]
        kept = self._kept.get(family.name, {})
        renewed = self._kept[family.name] = {}
        for values, sample in family.samples.items():
            found = kept.get(values)
            if found is None or (found[0] is not sample and found[0] != sample):
                found = sample, _sample_text(family, values, sample)
            renewed[values] = found
            parts.append(found[1])
        return "".join(parts)


def _heading(family: Family) -> str:
    return f"# HELP {family.name} {' '.join(family.help.split())}\n# TYPE {family.name} {family.kind}\n"


def _sample_text(family: Family, values: tuple[str, ...], sample: float | Histogram) -> str:
    """The lines of one value, or of one histogram."""
    # TorchServe's client ends the label list with a comma, and dashboards' regular expressions expect it.
    labels = "".join([f'{name}="{_escape(value)}",' for name, value in zip(family.labels, values, strict=True)])
    if isinstance(sample, Histogram):
        return "".join(_histogram_lines(family.name, labels, sample))
    if not labels:
        return f"{family.name} {java_double(sample)}\n"
    return f"{family.name}{{{labels}}} {java_double(sample)}\n"


def _histogram_lines(name: str, labels: str, histogram: Histogram) -> list[str]:
    lines = []
    count = 0
    for bound, more in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
        count += more
        lines.append(f'{name}_bucket{{{labels}le="{java_double(bound)}",}} {java_double(count)}\n')
    lines.append(f"{name}_count{{{labels}}} {java_double(count)}\n")
    lines.append(f"{name}_sum{{{labels}}} {java_double(histogram.total)}\n")
    return lines


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def java_double(value: float) -> str:
    """A number as Java prints a double: `7.0`, `1.5E7`; infinity as Prometheus spells it."""
    value = float(value)
    if value == 0 or _EXPONENT_BELOW <= abs(value) < _EXPONENT_FROM:
        return repr(value)
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}[str(value)]
    sign, digits, _ = Decimal(repr(value)).normalize().as_tuple()
    mantissa = "".join(map(str, digits))
    exponent = Decimal(repr(value)).adjusted()
    return f"{'-' if sign else ''}{mantissa[0]}.{mantissa[1:] or '0'}E{exponent}"


def server_line(spec: MetricSpec, values: Sequence[str], value: float, epoch_s: int) -> str:
    """A value as ts_metrics.log shows it, `epoch_s` seconds since the epoch: see `model_line`."""
    return model_line(spec, values, value, str(epoch_s), "")


def model_line(spec: MetricSpec, values: Sequence[str], value: float, epoch: str, request_ids: str) -> str:
    """A value as model_metrics.log shows it, without the time that begins the line; the last dimension is the host.

    `epoch` is in seconds since the epoch; `request_ids` are the requests it belongs to, joined by commas, "" for none.
    """
    dimensions = ",".join(f"{name}:{each}" for name, each in zip(spec.dimensions[:-1], values[:-1], strict=True))
    requests = f",requestID:{request_ids}" if request_ids else ""
    head = f"{spec.name}.{spec.unit}:{java_double(value)}|#{dimensions}"
    return f"{head}|#hostname:{values[-1]}{requests},timestamp:{epoch}"
