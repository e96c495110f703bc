"""The configuration of the archiver."""

from wsgi_ts.archiver.torchserve_api import ModelArchiverConfig
