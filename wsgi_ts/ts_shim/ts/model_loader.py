from wsgi_ts.handlers.torchserve.model_loader import ModelLoader, ModelLoaderFactory, TsModelLoader
