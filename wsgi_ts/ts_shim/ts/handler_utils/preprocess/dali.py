from wsgi_ts.handlers.bundled.dali import get_dali_pipeline
