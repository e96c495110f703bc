"""The import paths of TorchServe, for handlers written for it. On sys.path only inside a model worker."""

from ts.version import __version__
