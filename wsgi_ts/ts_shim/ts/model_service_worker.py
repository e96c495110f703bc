"""A model worker on a socket."""

import sys

from wsgi_ts.handlers.torchserve.socket_worker import TorchModelServiceWorker, main

__all__ = ["TorchModelServiceWorker"]

if __name__ == "__main__":
    sys.exit(main())
