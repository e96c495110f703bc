"""The manifest."""

from wsgi_ts.archiver.torchserve_api import WorkflowManifest as Manifest

__all__ = ["Manifest"]
