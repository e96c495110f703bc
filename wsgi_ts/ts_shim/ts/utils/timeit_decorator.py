"""How long a function takes."""

from wsgi_ts.handlers.toolkit.utils import timeit
