"""wsgi-ts: a model server that takes over from TorchServe."""

__version__ = "0.1.0"

#: The TorchServe release whose interfaces this server speaks; shown where TorchServe shows its own version.
TORCHSERVE_VERSION = "0.12.0"
