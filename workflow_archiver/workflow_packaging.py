"""Packaging a workflow; also `python -m workflow_archiver.workflow_packaging`.

The steps are looked up here by name, so that scripts and tests can put their own in place of them.
"""

from __future__ import annotations

import argparse
import logging
import sys

from .arg_parser import ArgParser
from .workflow_archiver_error import WorkflowArchiverError
from .workflow_packaging_utils import WorkflowExportUtils


def package_workflow(args: argparse.Namespace, manifest: str) -> None:
    """Writes a workflow archive with this manifest.

    Raises:
        SystemExit: 1, after the reason was logged.
    """
    staging: list[str] = []
    try:
        WorkflowExportUtils.validate_inputs(args.workflow_name, args.export_path)
        directory = WorkflowExportUtils.check_war_already_exists(args.workflow_name, args.export_path, args.force)
        files = [args.spec_file, args.handler, args.extra_files]
        staging.append(WorkflowExportUtils.copy_artifacts(args.workflow_name, files))
        WorkflowExportUtils.archive(directory, args.workflow_name, staging[0], manifest)
        logging.info("Successfully exported workflow %s to file %s", args.workflow_name, directory)
    except (WorkflowArchiverError, OSError) as error:
        logging.error(error)
        sys.exit(1)
    finally:
        WorkflowExportUtils.clean_temp_files(staging)


def generate_workflow_archive() -> None:
    """Writes the workflow archive of this process's command line.

    Raises:
        SystemExit: 1, after the reason was logged.
    """
    logging.basicConfig(format="%(levelname)s - %(message)s")
    args = ArgParser.workflow_archiver_args_parser().parse_args()
    manifest = WorkflowExportUtils.generate_manifest_json(args)
    package_workflow(args, manifest=manifest)


if __name__ == "__main__":
    generate_workflow_archive()
