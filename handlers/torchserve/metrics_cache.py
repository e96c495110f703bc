"""A cache of metrics without a server: TorchServe's, for tests of handlers and for tools."""

from __future__ import annotations

import os

from wsgi_ts.handlers.metrics.cache import MetricsCache
from wsgi_ts.handlers.metrics.errors import MetricsCacheTypeError
from wsgi_ts.handlers.metrics.metric import Sample, log_sample


class LoggedMetrics(MetricsCache):
    """A cache of metrics whose values go to the log at once; its metrics are those that a handler makes."""

    def record(self, sample: Sample) -> None:
        """Logs a value."""
        log_sample(sample)


class LoggedMetricsCache(LoggedMetrics):
    """A cache of metrics whose values go to the log at once.

    Args:
        config_file_path: a metrics.yaml, which is read now; its metrics are made by `initialize_cache`.
        model_name: the model's name.

    Raises:
        MetricsCacheTypeError: not a path.
        MetricsCacheIOError: the file cannot be read.
        MetricsCachePyYamlError: it is not YAML.
    """

    def __init__(self, config_file_path: str | None, model_name: str = "") -> None:
        super().__init__(config_file_path, model_name)
        try:
            os.path.exists(config_file_path)  # type: ignore[arg-type]  # what is no path is refused here
        except Exception as error:
            raise MetricsCacheTypeError(f"Error loading {config_file_path} file: {error}") from error
        self._parse_yaml_file(config_file_path)
