from wsgi_ts.handlers.toolkit.micro_batching import HANDLER_METHODS, MicroBatching
