from wsgi_ts.handlers.toolkit.hf_utils import download_model
