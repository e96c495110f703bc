"""What `context.metrics` raises: TorchServe's errors of its metrics cache."""

from __future__ import annotations


class GeneralMetricsCacheError(Exception):
    """The base of the errors below."""

    prefix = "Generic error"

    def __init__(self, message: object = None) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.prefix}: {self.message}"


class MetricsCacheIOError(GeneralMetricsCacheError):
    """The metrics configuration cannot be read."""

    prefix = "Error reading file"


class MetricsCachePyYamlError(GeneralMetricsCacheError):
    """The metrics configuration is not YAML."""

    prefix = "Error parsing file"


class MetricsCacheTypeError(GeneralMetricsCacheError):
    """An argument has the wrong type."""


class MetricsCacheValueError(GeneralMetricsCacheError, ValueError):
    """An argument has a value that is not allowed."""


class MetricsCacheKeyError(GeneralMetricsCacheError):
    """There is no such metric, or no such key in the metrics configuration."""
