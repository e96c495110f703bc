"""The manifest's entry for the model."""

from wsgi_ts.archiver.manifest import Model
