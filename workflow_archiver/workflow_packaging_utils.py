"""The steps of packaging."""

from wsgi_ts.archiver.torchserve_api import WorkflowExportUtils
