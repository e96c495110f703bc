"""The handler to derive from, and which packages it could use."""

import os
from importlib.util import find_spec

from wsgi_ts.handlers.bundled.base import BaseHandler

PROFILER_AVAILABLE = PT2_AVAILABLE = PT230_AVAILABLE = True
XLA_AVAILABLE = find_spec("torch_xla") is not None
ONNX_AVAILABLE = find_spec("onnxruntime") is not None
IPEX_AVAILABLE = os.environ.get("TS_IPEX_ENABLE") == "true" and find_spec("intel_extension_for_pytorch") is not None
