"""TorchServe's import paths of the workflow archiver."""

from .version import __version__
