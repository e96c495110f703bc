"""TorchServe's import paths of the model archiver."""

from .version import __version__  # isort: skip

from .model_archiver import ModelArchiver
from .model_archiver_config import ModelArchiverConfig
