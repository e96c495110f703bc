"""The frames between server and worker, and the older place of the streaming call."""

from wsgi_ts.handlers.serving.results import send_intermediate_predict_response
from wsgi_ts.handlers.torchserve.wire import (
    create_load_model_response,
    create_predict_response,
    encode_response_headers,
    retrieve_msg,
)
