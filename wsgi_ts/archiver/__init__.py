"""Packing models and workflows: the commands, and `create_model_archive` for build scripts."""

from wsgi_ts.archiver.pack import (
    ModelArchiveRequest,
    WorkflowArchiveRequest,
    create_model_archive,
    create_workflow_archive,
    main,
    workflow_main,
)
from wsgi_ts.archiver.writer import ArchiverError

__all__ = [
    "ArchiverError",
    "ModelArchiveRequest",
    "WorkflowArchiveRequest",
    "create_model_archive",
    "create_workflow_archive",
    "main",
    "workflow_main",
]
