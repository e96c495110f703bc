"""The Python interface of TorchServe's archivers, on top of `wsgi_ts.archiver.pack`.

The packages `model_archiver` and `workflow_archiver` re-export it under the names that build scripts import. New code
has it simpler with `create_model_archive` of `wsgi_ts.archiver`. What cannot be done raises `ArchiverError` with the
text for the user, here as there.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wsgi_ts.archiver import pack
from wsgi_ts.archiver.manifest import Model, Workflow, WorkflowManifest
from wsgi_ts.archiver.pack import ModelArchiveRequest, WorkflowArchiveRequest
from wsgi_ts.archiver.writer import FORMATS, ArchiverError, Contents, write_archive

#: What the bundled handlers take, by their names.
MODEL_HANDLERS = {
    "base_handler": "anything",
    "text_classifier": "text",
    "image_classifier": "vision",
    "object_detector": "vision",
    "image_segmenter": "vision",
    "dali_image_classifier": "vision",
    "vllm_handler": "text",
    "trt_llm_handler": "text",
}


class ModelArchiverConfig(ModelArchiveRequest):
    """What to archive: a `ModelArchiveRequest` in TorchServe's order, name, handler, version."""

    def __init__(self, model_name: str, handler: str, version: str, *others: Any, **named: Any) -> None:
        super().__init__(model_name, version, handler, *others, **named)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelArchiverConfig:
        """Returns the configuration that a parsed command line stands for."""
        return cls(**_fields(args, ModelArchiveRequest))


def _fields(config: Any, request: type) -> dict[str, Any]:
    """Returns what of a configuration or a parsed command line the request has, too."""
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
        """Makes a directory, unless it exists."""
        os.makedirs(d, exist_ok=True)

    @staticmethod
    def directory_filter(directory: str, unwanted_dirs: Iterable[str]) -> bool:
        """Returns whether a directory goes into an archive: it is not hidden, and none of the unwanted ones."""
        return directory not in unwanted_dirs and not directory.startswith(".")


class ModelExportUtils(_ExportUtils):
    """The steps of making a model archive, one by one."""

    @staticmethod
    def get_archive_export_path(export_file_path: str, model_name: str, archive_format: str) -> str:
        """Returns the path of the archive."""
        return os.path.join(export_file_path, model_name + FORMATS[archive_format])

    @staticmethod
    def check_mar_already_exists(
        model_name: str, export_file_path: str | None, overwrite: bool, archive_format: str = "default"
    ) -> str:
        """Returns the archive's directory; the archive must not exist unless it may be overwritten."""
        directory = os.getcwd() if export_file_path is None else export_file_path
        path = ModelExportUtils.get_archive_export_path(directory, model_name, archive_format)
        pack.check_overwrite(path, overwrite, "model")
        return directory

    @staticmethod
    def find_unique(files: Sequence[str], suffix: str) -> str | None:
        """Returns the one file with this suffix, None if there is none; several are refused."""
        found = [file for file in files if file.endswith(suffix)]
        if len(found) > 1:
            raise ArchiverError(
                f"model-archiver expects only one {suffix} file in the folder. Found {len(found)} files {found} in "
                "model-path."
            )
        return found[0] if found else None

    @staticmethod
    def generate_model(modelcfg: ModelArchiverConfig | argparse.Namespace) -> Model:
        """Returns the manifest's entry for the model."""
        return pack.model_manifest(modelcfg).model

    @staticmethod
    def generate_manifest_json(config: ModelArchiverConfig | argparse.Namespace) -> str:
        """Returns the text of the manifest."""
        return pack.model_manifest(config).text()

    @staticmethod
    def copy_artifacts(model_name: str, runtime: str, **kwargs: str | None) -> str:
        """Copies the files of an archive into a new directory.

        `kwargs` has files by kind: handler, serialized_file, model_file, extra_files, …

        Returns:
            The directory, which the caller removes.

        Raises:
            MissingFileError: a file does not exist.
        """
        contents = Contents(Path(f"{model_name}.mar"))
        for kind, path in kwargs.items():
            if kind == "extra_files":
                pack.add_extra_files(contents, path)
            elif path:
                file = pack.find_handler_file(path, runtime) if kind == "handler" else Path(path)
                if file is not None:
                    contents.add_file(file)
        return _staged(model_name, contents)

    @staticmethod
    def archive(
        export_file: str, model_name: str, model_path: str, manifest: str, archive_format: str = "default"
    ) -> None:
        """Writes the archive of the directory `model_path` into the directory `export_file`."""
        output = ModelExportUtils.get_archive_export_path(export_file, model_name, archive_format)
        _archive_tree(model_path, output, {"MAR-INF/MANIFEST.json": manifest}, archive_format, model_name)

    @staticmethod
    def archive_dir(
        path: str, dst: str | zipfile.ZipFile | tarfile.TarFile, archive_format: str, model_name: str
    ) -> None:
        """Adds a directory to what is being written: an open zip or tar file, or the path of an archive."""
        if isinstance(dst, str):
            _archive_tree(path, dst, {}, archive_format, model_name)
            return
        open_path = dst.filename if isinstance(dst, zipfile.ZipFile) else dst.name
        contents = Contents(Path(str(open_path or "")))
        contents.add_tree(Path(path))
        for name, source in contents.files.items():
            if isinstance(dst, zipfile.ZipFile):
                dst.write(source, name)
            else:
                dst.add(source, os.path.join(model_name, name))

    @staticmethod
    def file_filter(current_file: str, files_to_exclude: Iterable[str]) -> bool:
        """Returns whether a file goes into an archive: no manifest, archive, compiled Python or excluded one."""
        excluded = {*files_to_exclude, "MANIFEST.json"}
        return current_file not in excluded and not current_file.endswith((".pyc", ".DS_Store", ".mar"))

    @staticmethod
    def check_model_name_regex_or_exit(model_name: str) -> None:
        """Refuses a name that the server would refuse."""
        pack.check_name("Model", model_name)

    @staticmethod
    def validate_inputs(model_name: str, export_path: str) -> None:
        """Checks the name and the directory; a directory that is missing is made."""
        pack.check_name("Model", model_name)
        pack.output_path(export_path, model_name)


def _staged(name: str, contents: Contents) -> str:
    """Copies files into a new directory; returns it."""
    directory = tempfile.mkdtemp(prefix=f"{name}-")
    try:
        _copy_into(Path(directory), contents)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def _copy_into(folder: Path, contents: Contents) -> None:
    for name, source in contents.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _archive_tree(folder: str, output: str, documents: dict[str, str], archive_format: str, root_name: str) -> None:
    contents = Contents(Path(output))
    contents.add_tree(Path(folder))
    write_archive(contents, documents, archive_format, root_name)


class WorkflowExportUtils(_ExportUtils):
    """The steps of making a workflow archive, one by one."""

    @staticmethod
    def clean_temp_files(temp_files: Iterable[str]) -> None:
        """Removes files and directories."""
        for path in temp_files:
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)

    @staticmethod
    def get_archive_export_path(export_file_path: str, workflow_name: str) -> str:
        """Returns the path of the archive."""
        return os.path.join(export_file_path, f"{workflow_name}.war")

    @staticmethod
    def check_war_already_exists(workflow_name: str, export_file_path: str | None, overwrite: bool) -> str:
        """Returns the archive's directory; the archive must not exist unless it may be overwritten."""
        directory = os.getcwd() if export_file_path is None else export_file_path
        path = WorkflowExportUtils.get_archive_export_path(directory, workflow_name)
        pack.check_overwrite(path, overwrite, "workflow")
        return directory

    @staticmethod
    def generate_workflow(workflow_args: argparse.Namespace) -> Workflow:
        """Returns the manifest's entry for the workflow."""
        return pack.workflow_manifest(WorkflowArchiveRequest(**_fields(workflow_args, WorkflowArchiveRequest))).workflow

    @staticmethod
    def generate_manifest_json(args: argparse.Namespace) -> str:
        """Returns the text of the manifest."""
        return str(WorkflowManifest(WorkflowExportUtils.generate_workflow(args)))

    @staticmethod
    def copy_artifacts(workflow_name: str, artifact_files: Iterable[str | None]) -> str:
        """Copies the files of an archive, comma-separated lists of which are given, into a new directory.

        Returns:
            The directory, which `clean_temp_files` removes.
        """
        contents = Contents(Path(f"{workflow_name}.war"))
        for files in artifact_files:
            pack.add_extra_files(contents, files)
        return _staged(workflow_name, contents)

    @staticmethod
    def archive(export_file: str, workflow_name: str, workflow_path: str, manifest: str) -> None:
        """Writes the archive of a directory into the directory `export_file`."""
        contents = Contents(Path(WorkflowExportUtils.get_archive_export_path(export_file, workflow_name)))
        contents.add_tree(Path(workflow_path))
        write_archive(contents, {"WAR-INF/MANIFEST.json": manifest}, "default", workflow_name, kind="workflow")

    @staticmethod
    def archive_dir(path: str, dst: zipfile.ZipFile) -> None:
        """Adds a directory to an archive that is being written."""
        contents = Contents(Path(dst.filename or ""))
        contents.add_tree(Path(path))
        for name, source in contents.files.items():
            dst.write(source, name)

    @staticmethod
    def file_filter(current_file: str, files_to_exclude: Iterable[str]) -> bool:
        """Returns whether a file goes into an archive: no manifest, archive, compiled Python or excluded one."""
        excluded = {*files_to_exclude, "MANIFEST.json"}
        return current_file not in excluded and not current_file.endswith((".pyc", ".DS_Store", ".war"))

    @staticmethod
    def check_workflow_name_regex_or_exit(workflow_name: str) -> None:
        """Refuses a name with characters that are not allowed."""
        pack.check_name("Workflow", workflow_name)

    @staticmethod
    def validate_inputs(workflow_name: str, export_path: str) -> None:
        """Checks the name and the directory, which has to be there."""
        pack.check_name("Workflow", workflow_name)
        pack.output_path(export_path, workflow_name, made=False)


class ModelArgParser:
    """The command line of `torch-model-archiver`."""

    @staticmethod
    def export_model_args_parser() -> ModelArchiverConfig:
        """Returns the configuration that this process's command line stands for."""
        return ModelArchiverConfig.from_args(pack.model_parser().parse_args())


class WorkflowArgParser:
    """The command line of `torch-workflow-archiver`."""

    workflow_archiver_args_parser = staticmethod(pack.workflow_parser)
