"""The steps of packaging."""

import zipfile

from wsgi_ts.archive_writer import FORMATS as archiving_options
from wsgi_ts.archiver_api import MODEL_HANDLERS as model_handlers
from wsgi_ts.archiver_api import ModelExportUtils

__all__ = ["ModelExportUtils", "archiving_options", "model_handlers", "zipfile"]
