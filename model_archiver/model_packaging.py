"""Packaging a model; also `python -m model_archiver.model_packaging`.

The steps are looked up here by name, so that scripts and tests can put their own in place of them.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys

from model_archiver.arg_parser import ArgParser
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_archiver_error import ModelArchiverError
from model_archiver.model_packaging_utils import ModelExportUtils


def package_model(config: ModelArchiverConfig | argparse.Namespace, manifest: str) -> None:
    """Writes a model archive with this manifest.

    Raises:
        ModelArchiverError: the archive cannot be made.
    """
    staging = None
    try:
        ModelExportUtils.validate_inputs(config.model_name, config.export_path)
        directory = ModelExportUtils.check_mar_already_exists(
            config.model_name, config.export_path, config.force, config.archive_format
        )
        files = {
            "model_file": config.model_file,
            "serialized_file": config.serialized_file,
            "handler": config.handler,
            "extra_files": config.extra_files,
            "requirements_file": config.requirements_file,
            "config_file": config.config_file,
        }
        staging = ModelExportUtils.copy_artifacts(config.model_name, config.runtime, **files)
        ModelExportUtils.archive(directory, config.model_name, staging, manifest, config.archive_format)
        logging.info("Successfully exported model %s to file %s", config.model_name, directory)
    except ModelArchiverError as error:
        logging.error(error)
        raise
    finally:
        if staging is not None:
            shutil.rmtree(staging)


def generate_model_archive(config: ModelArchiverConfig | argparse.Namespace | None = None) -> None:
    """Writes the model archive of a configuration, by default that of this process's command line.

    Raises:
        ModelArchiverError: the archive cannot be made.
    """
    logging.basicConfig(format="%(levelname)s - %(message)s")
    if config is None:
        config = ArgParser.export_model_args_parser()
    package_model(config, manifest=ModelExportUtils.generate_manifest_json(config))


if __name__ == "__main__":
    try:
        generate_model_archive()
    except ModelArchiverError:
        sys.exit(1)
