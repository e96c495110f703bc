"""The older place of the streaming call."""

from wsgi_ts.handlers.results import send_intermediate_predict_response

__all__ = ["send_intermediate_predict_response"]
