"""Base of handlers whose model is cut into stages."""

from wsgi_ts.handlers.distributed.pippy import BasePippyHandler
