from wsgi_ts.handlers.serving.context import Context, RequestProcessor
