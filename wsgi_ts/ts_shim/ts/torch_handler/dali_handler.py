"""Base of the handlers with a DALI pipeline."""

from wsgi_ts.handlers.bundled.dali import DALIHandler

DaliHandler = DALIHandler
