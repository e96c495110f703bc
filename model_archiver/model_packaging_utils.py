"""The steps of packaging."""

import zipfile

from wsgi_ts.archiver.torchserve_api import MODEL_HANDLERS as model_handlers
from wsgi_ts.archiver.torchserve_api import ModelExportUtils
from wsgi_ts.archiver.writer import FORMATS as archiving_options
