"""The steps of packaging."""

from wsgi_ts.archiver_api import WorkflowExportUtils

__all__ = ["WorkflowExportUtils"]
