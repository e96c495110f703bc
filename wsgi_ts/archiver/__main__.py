"""`python -m wsgi_ts.archiver`: the command `torch-model-archiver`."""

import sys

from wsgi_ts.archiver.pack import main

if __name__ == "__main__":
    sys.exit(main())
