"""The service that runs a handler."""

import sys

from wsgi_ts.handlers.torchserve import service
from wsgi_ts.handlers.torchserve.service import PREDICTION_METRIC, PredictionException, Service, emit_metrics

# The module itself, so that a test that replaces a name in it replaces what runs.
sys.modules[__name__] = service
