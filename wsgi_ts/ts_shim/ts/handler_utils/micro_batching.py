"""Micro-batching inside a handler."""

from wsgi_ts.handlers.toolkit.micro_batching import HANDLER_METHODS, MicroBatching

__all__ = ["HANDLER_METHODS", "MicroBatching"]
