"""The manifest."""

from wsgi_ts.archiver_api import WorkflowManifest as Manifest

__all__ = ["Manifest"]
