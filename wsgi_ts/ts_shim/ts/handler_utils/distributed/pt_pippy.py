"""A model cut into stages."""

from wsgi_ts.handlers.distributed.pipeline import get_pipeline_driver, get_pipline_driver
from wsgi_ts.handlers.distributed.pippy import initialize_rpc_workers
