"""The manifest's entry for the model."""

from wsgi_ts.archiver.torchserve_api import Model

__all__ = ["Model"]
