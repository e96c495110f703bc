"""Streaming and class look-up."""

from wsgi_ts.handlers.results import send_intermediate_predict_response
from wsgi_ts.handlers.utils import import_class
from wsgi_ts.handlers.wire import create_predict_response

__all__ = ["create_predict_response", "import_class", "send_intermediate_predict_response"]
