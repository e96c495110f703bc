"""TorchServe's import paths of the model archiver."""

from wsgi_ts.archiver.torchserve_api import ModelArchiver, ModelArchiverConfig
