"""The manifest's entry for the workflow."""

from wsgi_ts.archiver.manifest import Workflow
