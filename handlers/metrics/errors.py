"""What `context.metrics` raises: TorchServe's errors of its metrics cache.

Each is also the error of Python that it stands for, so that handlers may catch either.
"""

from __future__ import annotations

import yaml


class GeneralMetricsCacheError(Exception):
    """The base of the errors below."""

    prefix = "Generic error: "

    def __init__(self, message: object = None) -> None:
        super().__init__(f"{self.prefix}{message}")


class MetricsCacheIOError(GeneralMetricsCacheError, OSError):
    """The metrics configuration cannot be read."""

    prefix = "Error reading file: "


class MetricsCachePyYamlError(GeneralMetricsCacheError, yaml.YAMLError):
    """The metrics configuration is not YAML."""

    prefix = "Error parsing file: "


class MetricsCacheTypeError(GeneralMetricsCacheError, TypeError):
    """An argument has the wrong type."""

    prefix = ""


class MetricsCacheValueError(GeneralMetricsCacheError, ValueError):
    """An argument has a value that is not allowed."""

    prefix = ""


class MetricsCacheKeyError(GeneralMetricsCacheError, KeyError):
    """There is no such metric, or no such key in the metrics configuration."""

    prefix = ""
