"""`python -m wsgi_ts.cli`: the command `torchserve`."""

import sys

from wsgi_ts.cli.commands import torchserve

if __name__ == "__main__":
    sys.exit(torchserve())
