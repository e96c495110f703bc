"""Micro-batching inside a handler."""

from wsgi_ts.handlers.bundled.micro_batching import HANDLER_METHODS, MicroBatching

__all__ = ["HANDLER_METHODS", "MicroBatching"]
