"""Base of handlers whose model is shared out among ranks."""

from wsgi_ts.handlers.distributed.tensor_parallel import BaseTensorParallelHandler
