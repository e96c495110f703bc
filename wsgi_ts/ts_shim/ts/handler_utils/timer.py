from wsgi_ts.handlers.toolkit.utils import timed
