"""Packaging a model; also `python -m model_archiver.model_packaging`."""

import sys

from wsgi_ts.archiver.pack import main
from wsgi_ts.archiver.torchserve_api import generate_model_archive, package_model

if __name__ == "__main__":
    sys.exit(main())
