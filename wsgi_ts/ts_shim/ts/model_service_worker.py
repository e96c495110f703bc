"""A model worker on a socket."""

import sys

from wsgi_ts.handlers.torchserve import socket_worker
from wsgi_ts.handlers.torchserve.socket_worker import TorchModelServiceWorker, main

if __name__ == "__main__":
    sys.exit(main())
# The module itself, so that a test that replaces a name in it replaces what runs.
sys.modules[__name__] = socket_worker
