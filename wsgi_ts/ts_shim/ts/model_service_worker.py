"""A model worker on a socket."""

import sys

from wsgi_ts.handlers.torchserve.socket_worker import TorchModelServiceWorker, main

if __name__ == "__main__":
    sys.exit(main())
