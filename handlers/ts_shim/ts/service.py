"""The service that runs a handler."""

from wsgi_ts.handlers.metrics_store import emit_metrics
from wsgi_ts.handlers.service import PREDICTION_METRIC, Service
from wsgi_ts.handlers.utils import PredictionException

__all__ = ["PREDICTION_METRIC", "PredictionException", "Service", "emit_metrics"]
