from wsgi_ts.handlers.distributed.ranks import BasePippyHandler
