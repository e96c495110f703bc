from wsgi_ts.handlers.toolkit.text_utils import CONTRACTION_MAP
