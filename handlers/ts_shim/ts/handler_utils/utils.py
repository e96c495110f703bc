"""Streaming and class look-up."""

from wsgi_ts.handlers.results import send_intermediate_predict_response
from wsgi_ts.handlers.utils import import_class

__all__ = ["import_class", "send_intermediate_predict_response"]
