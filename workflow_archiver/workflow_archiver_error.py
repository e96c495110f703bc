"""The error of the archiver."""

from wsgi_ts.archive_writer import ArchiverError as WorkflowArchiverError

__all__ = ["WorkflowArchiverError"]
