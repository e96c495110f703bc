"""The error of the archiver."""

from wsgi_ts.archiver.writer import ArchiverError as ModelArchiverError
