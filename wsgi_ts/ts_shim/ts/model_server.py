"""The command `torchserve`."""

import sys

from wsgi_ts.cli.commands import torchserve as start

if __name__ == "__main__":
    sys.exit(start())
