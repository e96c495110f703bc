"""`python -m wsgi_ts.batcher.worker`: a model worker in an interpreter of its own."""

import sys

from wsgi_ts.batcher.worker.main import main

if __name__ == "__main__":
    sys.exit(main())
