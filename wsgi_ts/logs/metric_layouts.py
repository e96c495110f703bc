"""TorchServe's own layouts for the metrics logs: a JSON object, or QLog's block of lines, for each metric.

They take the lines that ts_metrics.log and model_metrics.log have anyway; what is no metric stays as it is.
"""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod

_LINE = re.compile(
    r"(?P<name>[^.:|]+)\.(?P<unit>[^.:|]+):(?P<value>[^|]+)\|#(?P<dimensions>[^|]*)"
    r"\|#hostname:(?P<host>[^,]*)(?:,requestID:(?P<requests>.*))?,timestamp:(?P<epoch>[^,]*)"
)


class MetricLayout(logging.Formatter, ABC):
    """Writes metrics in a form of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The message of a record, in the layout's form where it is a metric."""
        message = record.getMessage()
        found = _LINE.fullmatch(message)
        return message if found is None else self.metric(found)

    @abstractmethod
    def metric(self, found: re.Match[str]) -> str:
        """The text of a metric, without the line end after it."""


class JsonLayout(MetricLayout):
    """JSONPatternLayout: one object on one line; what is not known is left out."""

    def metric(self, found: re.Match[str]) -> str:
        """The object."""
        fields = {
            "MetricName": found["name"],
            "Value": found["value"],
            "Unit": found["unit"],
            "Dimensions": [{"Name": name, "Value": value} for name, value in _dimensions(found)],
            "Timestamp": found["epoch"],
            "RequestId": found["requests"],
            "HostName": found["host"],
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None}, ensure_ascii=False)


class QlogLayout(MetricLayout):
    """QLogLayout: lines of NAME=VALUE up to `EOE`. The variables are those that TorchServe reads."""

    def __init__(self) -> None:
        super().__init__()
        self._program = os.environ.get("MXNETMODELSERVER_PROGRAM") or "MXNetModelServer"
        realm = os.environ.get("REALM")
        domain = os.environ.get("DOMAIN") or "Unknown"
        self._marketplace = f"{self._program}:{domain}:{realm}" if realm else ""

    def metric(self, found: re.Match[str]) -> str:
        """The block of lines."""
        dimensions = "".join(f" {name}|{value} " for name, value in _dimensions(found))
        rows = {
            "HostName": found["host"],
            "RequestId": found["requests"],
            "Marketplace": self._marketplace,
            "StartTime": found["epoch"],
            "Program": self._program,
            "Metrics": f"{found['name']}={found['value']} {found['unit']}{dimensions}",
        }
        return "\n".join([*(f"{name}={value}" for name, value in rows.items() if value), "EOE"])


def _dimensions(found: re.Match[str]) -> list[tuple[str, str]]:
    pairs = (each.partition(":") for each in found["dimensions"].split(",") if each)
    return [(name, value) for name, _, value in pairs]
