"""A model handed to DeepSpeed."""

from wsgi_ts.handlers.distributed.deepspeed import get_ds_engine

__all__ = ["get_ds_engine"]
