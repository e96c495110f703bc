"""The archiver and its configuration."""

from wsgi_ts.archiver_api import ModelArchiver

__all__ = ["ModelArchiver"]
