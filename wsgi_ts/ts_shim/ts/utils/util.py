from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.loader import list_classes_from_module
from wsgi_ts.handlers.toolkit.utils import (
    CLEANUP_REGEX,
    PT2Backend,
    check_valid_pt2_backend,
    deprecated,
    get_yaml_config,
    load_label_mapping,
    map_class_to_label,
)
