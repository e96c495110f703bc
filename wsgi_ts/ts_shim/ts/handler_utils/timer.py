from wsgi_ts.handlers.toolkit.phase_times import timed
