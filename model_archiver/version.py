"""The version of the archiver, as manifests name it."""

from wsgi_ts import TORCHSERVE_VERSION as __version__
