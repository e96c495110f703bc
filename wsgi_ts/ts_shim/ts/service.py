from wsgi_ts.handlers.metrics.store import emit_metrics
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.service import PREDICTION_METRIC, Service
