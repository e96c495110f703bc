from wsgi_ts.handlers.distributed.deepspeed import get_ds_engine
