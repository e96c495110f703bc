"""The manifest's entry for the workflow."""

from wsgi_ts.archiver.torchserve_api import Workflow

__all__ = ["Workflow"]
