"""Loading a model without a server."""

from wsgi_ts.handlers.torchserve.model_loader import ModelLoader, ModelLoaderFactory, TsModelLoader
