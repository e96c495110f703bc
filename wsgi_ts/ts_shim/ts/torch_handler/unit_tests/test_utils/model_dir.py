from wsgi_ts.handlers.testing import copy_files, download_model
