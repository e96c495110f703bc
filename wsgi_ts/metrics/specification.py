"""metrics.yaml: which metrics there are, with the type, unit and dimensions of each."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: libyaml's, ten times as fast, where PyYAML was built with it.
_Loader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: The file that counts where `metrics_config` names none.
DEFAULT_FILE = Path(__file__).with_name("metrics.yaml")
COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
HOSTNAME = "Hostname"
#: Names that the server gives to metrics of its own start so.
OWN_PREFIX = "wsgi_ts_"
_SERVER_SECTION, _MODEL_SECTION = "ts_metrics", "model_metrics"
_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class MetricsConfigError(Exception):
    """A metrics.yaml cannot be used; the message says which file, which entry and why."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        kind: `counter`, `gauge` or `histogram`.
        unit: as the file spells it.
        dimensions: their names, in the order of labels and log lines.
        order: where the value of each dimension stands among the values that the server gives; for the server's
            own metrics, whose dimensions a file may list in another order.
    """

    name: str
    kind: str
    unit: str
    dimensions: tuple[str, ...]
    order: tuple[int, ...] = ()

    @property
    def is_exposable(self) -> bool:
        """Whether Prometheus allows the name and the names of the labels."""
        return bool(_METRIC_NAME.fullmatch(self.name)) and all(map(_LABEL_NAME.fullmatch, self.dimensions))


@dataclass(frozen=True, slots=True)
class MetricsSpecification:
    """The metrics of one file, by name.

    Attributes:
        server: what the server records (`ts_metrics`).
        model: what handlers record (`model_metrics`); the last dimension of each is Hostname.
    """

    server: Mapping[str, MetricSpec]
    model: Mapping[str, MetricSpec]


def load_specification(path: Path | None, *, for_prometheus: bool = False) -> MetricsSpecification:
    """Reads and checks a metrics.yaml, by default the built-in one.

    `for_prometheus`: names that Prometheus does not allow are an error, too.

    Raises:
        MetricsConfigError: it cannot be read, is not YAML, or one of its entries is wrong.
    """
    path = path or DEFAULT_FILE
    content = _read(path)
    server = _section(path, content, _SERVER_SECTION)
    model = {
        name: dataclasses.replace(spec, dimensions=(*(each for each in spec.dimensions if each != HOSTNAME), HOSTNAME))
        for name, spec in _section(path, content, _MODEL_SECTION).items()
    }
    if twice := sorted(server.keys() & model.keys()):
        raise MetricsConfigError(f"{path}: {twice[0]} stands in {_SERVER_SECTION} and in {_MODEL_SECTION}")
    if path != DEFAULT_FILE:
        fitted = [_fitted(path, spec) for spec in server.values()]
        server = {spec.name: spec for spec in fitted if spec is not None}
    for spec in (*server.values(), *model.values()):
        if for_prometheus and not spec.is_exposable:
            raise MetricsConfigError(
                f"{path}: {spec.name}: Prometheus allows letters, digits and underscores in names of metrics and "
                f"dimensions, not {', '.join((spec.name, *spec.dimensions))}"
            )
    return MetricsSpecification(server, model)


@cache
def built_in_specification() -> MetricsSpecification:
    """The metrics of the built-in file."""
    return load_specification(None)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise MetricsConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise MetricsConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise MetricsConfigError(f"{path}: {_SERVER_SECTION} and {_MODEL_SECTION} are missing")
    return content


def _section(path: Path, content: dict[str, Any], name: str) -> dict[str, MetricSpec]:
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise MetricsConfigError(f"{path}: {name}: must hold counter, gauge and histogram")
    found: dict[str, MetricSpec] = {}
    for kind, entries in section.items():
        if kind not in (COUNTER, GAUGE, HISTOGRAM):
            raise MetricsConfigError(f"{path}: {name}: there is no type {kind!r}; use counter, gauge or histogram")
        if not isinstance(entries or [], list):
            raise MetricsConfigError(f"{path}: {name}: {kind}: must be a list of metrics")
        for number, entry in enumerate(entries or [], start=1):
            # A handler's metric always has the dimension Hostname: it may be the only one.
            least = 0 if name == _MODEL_SECTION else 1
            spec = _spec(f"{path}: {name}: {kind}: entry {number}", kind, entry, least)
            if spec.name in found:
                raise MetricsConfigError(f"{path}: {name}: {spec.name} is there twice")
            found[spec.name] = spec
    return found


def _spec(where: str, kind: str, entry: Any, least: int) -> MetricSpec:
    """Returns an entry of the file, checked; it has `least` dimensions or more."""
    if not isinstance(entry, dict):
        raise MetricsConfigError(f"{where}: must have name, unit and dimensions")
    name, unit, dimensions = (entry.get(key) for key in ("name", "unit", "dimensions"))
    if not isinstance(name, str) or not name:
        raise MetricsConfigError(f"{where}: `name` must be a text that is not empty, not {name!r}")
    where = f"{where} ({name})"
    if not isinstance(unit, str) or not unit:
        raise MetricsConfigError(f"{where}: `unit` must be a text that is not empty, not {unit!r}")
    texts = [] if dimensions is None else dimensions
    is_list = isinstance(texts, list) and all(isinstance(each, str) and each for each in texts)
    if not is_list or len(texts) < least:
        raise MetricsConfigError(f"{where}: `dimensions` must be a list of names, not {dimensions!r}")
    if len(set(texts)) < len(texts):
        raise MetricsConfigError(f"{where}: a dimension is named twice in {dimensions!r}")
    return MetricSpec(name, kind, unit, tuple(texts), tuple(range(len(texts))))


def _fitted(path: Path, spec: MetricSpec) -> MetricSpec | None:
    """A file's spec of a metric that the server records itself, with the order of its dimensions.

    None where the server has another number of values for it: then it is not recorded, and the log says why.
    """
    known = built_in_specification().server.get(spec.name)
    if known is None:
        return spec
    if len(spec.dimensions) != len(known.dimensions):
        wanted = ", ".join(known.dimensions)
        log.error(
            "%s: %s is not recorded: its dimensions are %s; they can be renamed and reordered", path, spec.name, wanted
        )
        return None
    places = {name.casefold(): place for place, name in enumerate(known.dimensions)}
    order = tuple(places.get(name.casefold(), -1) for name in spec.dimensions)
    if sorted(order) != sorted(places.values()):
        # Renamed: then the order is the built-in one.
        order = known.order
    kind = spec.kind
    if kind == HISTOGRAM:
        log.warning("%s: %s: the server records it as a %s, not as a histogram", path, spec.name, known.kind)
        kind = known.kind
    return dataclasses.replace(spec, kind=kind, order=order)
