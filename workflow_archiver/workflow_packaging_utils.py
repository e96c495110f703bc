"""The steps of packaging."""

from wsgi_ts.archiver.torchserve_api import WorkflowExportUtils

MANIFEST_FILE_NAME = "MANIFEST.json"
WAR_INF = "WAR-INF"
