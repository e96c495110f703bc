from wsgi_ts.handlers.serving.results import send_intermediate_predict_response
from wsgi_ts.handlers.toolkit.utils import import_class
from wsgi_ts.handlers.torchserve.wire import create_predict_response
