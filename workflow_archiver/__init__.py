"""TorchServe's import paths of the workflow archiver."""
