"""The error of the archiver."""

from wsgi_ts.archive_writer import ArchiverError as ModelArchiverError

__all__ = ["ModelArchiverError"]
