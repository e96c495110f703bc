"""Base of handlers whose model DeepSpeed serves."""

from wsgi_ts.handlers.distributed.deepspeed import BaseDeepSpeedHandler
