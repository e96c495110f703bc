from wsgi_ts.handlers.distributed.pippy import BasePippyHandler
