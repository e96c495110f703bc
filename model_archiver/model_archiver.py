"""The archiver and its configuration."""

from wsgi_ts.archiver.torchserve_api import ModelArchiver
