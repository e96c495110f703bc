"""The steps of packaging."""

# Tests of users patch it here, to pack without compression.
import zipfile

from wsgi_ts.archiver.torchserve_api import WorkflowExportUtils

MANIFEST_FILE_NAME = "MANIFEST.json"
WAR_INF = "WAR-INF"
