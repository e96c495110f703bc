"""A model handed to DeepSpeed."""

from wsgi_ts.handlers.distributed.deepspeed import get_ds_engine
