"""A model shared out among ranks."""

from wsgi_ts.handlers.distributed.tensor_parallel import get_tensor_parallel_model
