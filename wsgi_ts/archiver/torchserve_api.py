"""The Python interface of TorchServe's archivers, on top of `wsgi_ts.archiver.pack`.

The packages `model_archiver` and `workflow_archiver` re-export it under the names that build scripts import. New code
has it simpler with `wsgi_ts.archiver.pack.create_model_archive`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION
from wsgi_ts.archiver import pack as archiver
from wsgi_ts.archiver.pack import ModelArchiveRequest, WorkflowArchiveRequest
from wsgi_ts.archiver.writer import FORMATS, ArchiverError, Contents, write_archive

#: The bundled handlers by runtime.
MODEL_HANDLERS = {
    "python": list(archiver.BUNDLED_HANDLERS),
    "python3": list(archiver.BUNDLED_HANDLERS),
    "LSP": list(archiver.LSP_HANDLERS),
}


class RuntimeType(Enum):
    """What runs a handler."""

    PYTHON = "python"
    PYTHON3 = "python3"
    LSP = "LSP"


class _Document:
    """A part of a manifest: a dict, shown as JSON."""

    def __to_dict__(self) -> dict[str, Any]:
        raise NotImplementedError

    def __str__(self) -> str:
        return json.dumps(self.__to_dict__())

    __repr__ = __str__


@dataclass(repr=False)
class Model(_Document):
    """The manifest's entry `model`; what is None or empty is left out."""

    model_name: str
    serialized_file: str | None = None
    handler: str | None = None
    model_file: str | None = None
    model_version: str | None = None
    extensions: dict[str, Any] | None = None
    requirements_file: str | None = None
    config_file: str | None = None

    def __to_dict__(self) -> dict[str, Any]:
        fields = {
            "modelName": self.model_name,
            "serializedFile": _base(self.serialized_file),
            "handler": _base(self.handler),
            "modelFile": _base(self.model_file),
            "modelVersion": self.model_version,
            "extensions": self.extensions,
            "requirementsFile": _base(self.requirements_file),
            "configFile": _base(self.config_file),
        }
        return {key: value for key, value in fields.items() if value}


def _base(path: str | None) -> str:
    return os.path.basename(path or "")


@dataclass(repr=False)
class Manifest(_Document):
    """The manifest of a model archive.

    Raises:
        ValueError: there is no such runtime.
    """

    runtime: str
    model: Model

    def __post_init__(self) -> None:
        self.creation_time = archiver.now()
        self.runtime = RuntimeType(self.runtime).value

    def __to_dict__(self) -> dict[str, Any]:
        return {
            "createdOn": self.creation_time,
            "runtime": self.runtime,
            "model": self.model.__to_dict__(),
            "archiverVersion": TORCHSERVE_VERSION,
        }


@dataclass
class ModelArchiverConfig:
    """What to archive; the fields are the flags of `torch-model-archiver`."""

    model_name: str
    handler: str
    version: str
    serialized_file: str | None = None
    model_file: str | None = None
    extra_files: str | None = None
    runtime: str = "python"
    export_path: str = field(default_factory=os.getcwd)
    archive_format: str = "default"
    force: bool = False
    requirements_file: str | None = None
    config_file: str | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelArchiverConfig:
        """The configuration that a parsed command line stands for."""
        names = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in vars(args).items() if name in names})


class ModelArchiver:
    """The entry point for scripts."""

    @staticmethod
    def generate_model_archive(config: ModelArchiverConfig) -> None:
        """Writes a model archive.

        Raises:
            ArchiverError: with the text for the user.
        """
        generate_model_archive(config)


def generate_model_archive(config: ModelArchiverConfig | argparse.Namespace | None = None) -> None:
    """Writes the model archive of a configuration, by default that of this process's command line.

    Raises:
        ArchiverError: with the text for the user.
    """
    if config is None:
        logging.basicConfig(format="%(levelname)s - %(message)s")
        config = archiver.model_parser().parse_args()
    package_model(config, ModelExportUtils.generate_manifest_json(config))


def package_model(config: ModelArchiverConfig | argparse.Namespace, manifest_str: str) -> None:
    """Writes a model archive with this manifest.

    Raises:
        ArchiverError: with the text for the user.
    """
    archiver.create_model_archive(ModelArchiveRequest(**_fields(config, ModelArchiveRequest)), manifest_str)


def _fields(config: Any, request: type) -> dict[str, Any]:
    """What of a configuration or a parsed command line the request has, too."""
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(request) if hasattr(config, item.name)}


class _ExportUtils:
    """What both archivers offer of their inside."""

    @staticmethod
    def clean_temp_files(temp_files: Iterable[str]) -> None:
        """Removes files."""
        for file in temp_files:
            os.remove(file)

    @staticmethod
    def make_dir(d: str) -> None:
        """Makes a directory, unless it exists.

        Raises:
            FileExistsError: it is a file.
        """
        os.makedirs(d, exist_ok=True)

    @staticmethod
    def directory_filter(directory: str, unwanted_dirs: Iterable[str]) -> bool:
        """Whether a directory goes into an archive: it is not hidden, and none of the unwanted ones."""
        return directory not in unwanted_dirs and not directory.startswith(".")

    @staticmethod
    def file_filter(current_file: str, files_to_exclude: Iterable[str]) -> bool:
        """Whether a file goes into an archive: it is not hidden, not compiled Python and none of the excluded ones."""
        return current_file not in files_to_exclude and re.match(r"\.|.*\.pyc$", current_file) is None


class ModelExportUtils(_ExportUtils):
    """The steps of making a model archive, one by one."""

    @staticmethod
    def get_archive_export_path(export_path: str, model_name: str, archive_format: str) -> str:
        """The path of the archive."""
        return os.path.join(export_path, model_name + FORMATS[archive_format])

    @staticmethod
    def check_mar_already_exists(
        model_name: str, export_path: str | None, overwrite: bool, archive_format: str = "default"
    ) -> str:
        """The path of the archive.

        Raises:
            ArchiverError: it exists and is not to be overwritten.
        """
        path = ModelExportUtils.get_archive_export_path(export_path or os.getcwd(), model_name, archive_format)
        archiver.check_overwrite(Path(path), overwrite, "model")
        return path

    @staticmethod
    def find_unique(files: Sequence[str], suffix: str) -> str | None:
        """The one file with this suffix, None if there is none.

        Raises:
            ArchiverError: there are several.
        """
        found = [file for file in files if file.endswith(suffix)]
        if len(found) > 1:
            raise ArchiverError(f"More than one file ends in {suffix}: {', '.join(found)}. Keep one of them.")
        return found[0] if found else None

    @staticmethod
    def generate_model(modelargs: ModelArchiverConfig | argparse.Namespace) -> Model:
        """The manifest's entry for the model."""
        return Model(
            modelargs.model_name,
            serialized_file=modelargs.serialized_file,
            handler=modelargs.handler,
            model_file=modelargs.model_file,
            model_version=modelargs.version,
            requirements_file=modelargs.requirements_file,
            config_file=modelargs.config_file,
        )

    @staticmethod
    def generate_manifest_json(args: ModelArchiverConfig | argparse.Namespace) -> str:
        """The text of the manifest."""
        manifest = Manifest(args.runtime, ModelExportUtils.generate_model(args))
        return json.dumps(manifest.__to_dict__(), indent=2)

    @staticmethod
    def copy_artifacts(model_path: str, **kwargs: str | None) -> None:
        """Copies the files of an archive into a directory.

        Args:
            model_path: the directory.
            kwargs: file by its kind: handler, serialized_file, model_file, extra_files, …; `runtime` for the handler.

        Raises:
            ArchiverError: a file does not exist.
        """
        runtime = kwargs.pop("runtime", None) or "python"
        contents = Contents(Path(model_path))
        for kind, path in kwargs.items():
            if not path:
                continue
            if kind == "extra_files":
                archiver.add_extra_files(contents, path)
                continue
            file = archiver.find_handler_file(path, runtime) if kind == "handler" else Path(path)
            if file is not None:
                contents.add_file(file)
        for name, source in contents.files.items():
            target = Path(model_path) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)

    @staticmethod
    def archive(
        export_path: str, model_name: str, model_path: str, manifest: str, archive_format: str = "default"
    ) -> None:
        """Writes an archive of a directory.

        Raises:
            ArchiverError: it cannot be written.
        """
        output = Path(ModelExportUtils.get_archive_export_path(export_path, model_name, archive_format))
        contents = Contents(output)
        contents.add_tree(Path(model_path))
        write_archive(contents, {"MAR-INF/MANIFEST.json": manifest}, archive_format, model_name)

    @staticmethod
    def archive_dir(path: str, dst: str, archive_format: str, model_name: str) -> None:
        """Writes an archive of a directory that has its manifest already.

        Raises:
            ArchiverError: it cannot be written.
        """
        contents = Contents(Path(dst))
        contents.add_tree(Path(path))
        write_archive(contents, {}, archive_format, model_name)

    @staticmethod
    def check_model_name_regex_or_exit(model_name: str) -> None:
        """Refuses a name that the server would refuse.

        Raises:
            ArchiverError: it has characters that are not allowed.
        """
        archiver.check_name("Model", model_name)

    @staticmethod
    def validate_inputs(model_name: str, export_path: str) -> None:
        """Checks name and directory; a directory that is missing is made.

        Raises:
            ArchiverError: the name has characters that are not allowed, or the directory is none.
        """
        archiver.check_name("Model", model_name)
        archiver.output_path(export_path, model_name)


@dataclass(repr=False)
class Workflow(_Document):
    """The manifest's entry `workflow`."""

    workflow_name: str
    spec_file: str
    handler: str | None = None

    def __to_dict__(self) -> dict[str, Any]:
        fields = {
            "workflowName": self.workflow_name,
            "specFile": _base(self.spec_file),
            "handler": _base(self.handler),
        }
        return {key: value for key, value in fields.items() if value}


@dataclass(repr=False)
class WorkflowManifest(_Document):
    """The manifest of a workflow archive."""

    workflow: Workflow

    def __post_init__(self) -> None:
        self.creation_time = archiver.now()

    def __to_dict__(self) -> dict[str, Any]:
        return {
            "createdOn": self.creation_time,
            "workflow": self.workflow.__to_dict__(),
            "archiverVersion": archiver.WORKFLOW_ARCHIVER_VERSION,
        }


def generate_workflow_archive() -> None:
    """Writes the workflow archive of this process's command line, and ends the process if it cannot.

    Raises:
        SystemExit: 1, after the reason was logged.
    """
    status = archiver.workflow_main()
    if status:
        raise SystemExit(status)


def package_workflow(args: argparse.Namespace, manifest: str) -> None:
    """Writes a workflow archive with this manifest.

    Raises:
        ArchiverError: with the text for the user.
    """
    archiver.create_workflow_archive(WorkflowArchiveRequest(**_fields(args, WorkflowArchiveRequest)), manifest)


class WorkflowExportUtils(_ExportUtils):
    """The steps of making a workflow archive, one by one."""

    @staticmethod
    def check_war_already_exists(workflow_name: str, export_path: str | None, overwrite: bool) -> str:
        """The path of the archive.

        Raises:
            ArchiverError: it exists and is not to be overwritten.
        """
        path = os.path.join(export_path or os.getcwd(), workflow_name + ".war")
        archiver.check_overwrite(Path(path), overwrite, "workflow")
        return path

    @staticmethod
    def generate_manifest_json(args: argparse.Namespace) -> str:
        """The text of the manifest."""
        manifest = WorkflowManifest(Workflow(args.workflow_name, args.spec_file, args.handler))
        return json.dumps(manifest.__to_dict__(), indent=2)

    @staticmethod
    def check_workflow_name_regex_or_exit(workflow_name: str) -> None:
        """Refuses a name that the server would refuse.

        Raises:
            ArchiverError: it has characters that are not allowed.
        """
        archiver.check_name("Workflow", workflow_name)

    @staticmethod
    def validate_inputs(workflow_name: str, export_path: str) -> None:
        """Checks name and directory; a directory that is missing is made.

        Raises:
            ArchiverError: the name has characters that are not allowed, or the directory is none.
        """
        archiver.check_name("Workflow", workflow_name)
        archiver.output_path(export_path, workflow_name)


class ModelArgParser:
    """The command line of `torch-model-archiver`."""

    export_model_args_parser = staticmethod(archiver.model_parser)


class WorkflowArgParser:
    """The command line of `torch-workflow-archiver`."""

    workflow_archiver_args_parser = staticmethod(archiver.workflow_parser)
