"""The steps of packaging."""

# Tests of users patch it here, to pack without compression.
import zipfile

from wsgi_ts.archiver.torchserve_api import MODEL_HANDLERS as model_handlers
from wsgi_ts.archiver.torchserve_api import ModelExportUtils
from wsgi_ts.archiver.writer import FORMATS as archiving_options

MODEL_SERVER_VERSION = "1.0"
MODEL_ARCHIVE_VERSION = "1.0"
MANIFEST_FILE_NAME = "MANIFEST.json"
MAR_INF = "MAR-INF"
