"""Streaming of a batch that a transformers model generates."""

from wsgi_ts.handlers.toolkit.hf_batch_streamer import TextIteratorStreamerBatch
