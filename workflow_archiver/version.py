"""The version of the archiver, as manifests name it."""

from wsgi_ts.archiver.manifest import WORKFLOW_ARCHIVER_VERSION as __version__
