"""Packaging a workflow; also `python -m workflow_archiver.workflow_packaging`."""

import sys

from wsgi_ts.archiver.pack import workflow_main
from wsgi_ts.archiver.torchserve_api import generate_workflow_archive, package_workflow

if __name__ == "__main__":
    sys.exit(workflow_main())
