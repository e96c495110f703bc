"""The archiver, for scripts."""

from __future__ import annotations

import argparse

from model_archiver import model_packaging
from model_archiver.model_archiver_config import ModelArchiverConfig


class ModelArchiver:
    """The entry point for scripts."""

    @staticmethod
    def generate_model_archive(config: ModelArchiverConfig | argparse.Namespace) -> None:
        """Writes a model archive.

        Raises:
            ModelArchiverError: the archive cannot be made.
        """
        model_packaging.generate_model_archive(config)
