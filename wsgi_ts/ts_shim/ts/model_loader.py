"""Loading a model without a server."""

import sys

from wsgi_ts.handlers.torchserve import model_loader
from wsgi_ts.handlers.torchserve.model_loader import ModelLoader, ModelLoaderFactory, TsModelLoader

# The module itself, so that a test that replaces a name in it replaces what runs.
sys.modules[__name__] = model_loader
