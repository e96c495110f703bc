from wsgi_ts.handlers.torchserve.model_service import ModelService, SingleNodeService
