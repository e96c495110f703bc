"""`torch-model-archiver` and `torch-workflow-archiver`: the same flags, archives, texts and exit codes.

A mistake of the user ends with one message on standard error and exit status 1, wrong flags with status 2.
From Python: `create_model_archive(ModelArchiveRequest(...))`.
"""

from __future__ import annotations

import argparse
import difflib
import glob
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from wsgi_ts.archiver.manifest import Manifest, Model, Workflow, WorkflowManifest
from wsgi_ts.archiver.writer import FORMATS, ArchiverError, Contents, MissingFileError, write_archive

log = logging.getLogger(__name__)

#: Handlers that the server brings along; they are named in the manifest and not packed.
BUNDLED_HANDLERS = (
    "base_handler",
    "text_classifier",
    "image_classifier",
    "object_detector",
    "image_segmenter",
    "dali_image_classifier",
    "vllm_handler",
    "trt_llm_handler",
)
LSP_HANDLERS = ("BaseHandler", "TorchScriptHandler")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*\Z")
_NAME_RULE = r"^[A-Za-z0-9][A-Za-z0-9_\-.]*$"


@dataclass
class ModelArchiveRequest:
    """What to archive; the fields are the flags of `torch-model-archiver`.

    `extra_files` is a comma-separated list of files, directories (whose contents are taken) and wildcards.
    """

    model_name: str
    version: str
    handler: str
    serialized_file: str | None = None
    model_file: str | None = None
    extra_files: str | None = None
    runtime: str = "python"
    export_path: str = field(default_factory=os.getcwd)
    archive_format: str = "default"
    force: bool = False
    requirements_file: str | None = None
    config_file: str | None = None


@dataclass
class WorkflowArchiveRequest:
    """What to archive; the fields are the flags of `torch-workflow-archiver`."""

    workflow_name: str
    spec_file: str
    handler: str | None = None
    extra_files: str | None = None
    export_path: str = field(default_factory=os.getcwd)
    force: bool = False


def create_model_archive(request: ModelArchiveRequest, manifest: str | None = None) -> Path:
    """Writes the model archive; returns its path. `manifest`: the text of a MANIFEST.json in place of the request's.

    Raises:
        ArchiverError: with the text for the user; an older archive is then untouched.
        ValueError: there is no such runtime.
    """
    if request.archive_format not in FORMATS:
        raise ArchiverError(f"Unknown archive format {request.archive_format}: use one of {', '.join(FORMATS)}.")
    contents = _begin("Model", request.model_name, FORMATS[request.archive_format], request.export_path, request.force)
    handler_file = find_handler_file(request.handler, request.runtime)
    add_files(contents, request.model_file, request.serialized_file, handler_file)
    add_extra_files(contents, request.extra_files)
    add_files(contents, request.requirements_file, request.config_file)
    if manifest is None:
        manifest = model_manifest(request).text()
    write_archive(contents, {"MAR-INF/MANIFEST.json": manifest}, request.archive_format, request.model_name)
    log.info("Successfully exported model %s to file %s", request.model_name, request.export_path)
    return contents.output


def create_workflow_archive(request: WorkflowArchiveRequest) -> Path:
    """Writes the workflow archive (.war); returns its path.

    Raises:
        ArchiverError: with the text for the user; an older archive is then untouched.
    """
    contents = _begin("Workflow", request.workflow_name, ".war", request.export_path, request.force)
    add_files(contents, request.spec_file, request.handler)
    add_extra_files(contents, request.extra_files)
    documents = {"WAR-INF/MANIFEST.json": workflow_manifest(request).text()}
    write_archive(contents, documents, "default", request.workflow_name, kind="workflow")
    log.info("Successfully exported workflow %s to file %s", request.workflow_name, request.export_path)
    return contents.output


def _begin(kind: str, name: str, ending: str, export_path: str, force: bool) -> Contents:
    """Returns the contents, still empty, of an archive that may be written."""
    check_name(kind, name)
    output = output_path(export_path, name + ending, made=kind == "Model")
    check_overwrite(output, force, kind.lower())
    return Contents(output)


def model_manifest(request: ModelArchiveRequest | argparse.Namespace) -> Manifest:
    """Returns the manifest of a model.

    Raises:
        ValueError: there is no such runtime.
    """
    model = Model(
        request.model_name,
        serialized_file=request.serialized_file,
        handler=request.handler,
        model_file=request.model_file,
        model_version=request.version,
        requirements_file=request.requirements_file,
        config_file=request.config_file,
    )
    return Manifest(request.runtime, model)


def workflow_manifest(request: WorkflowArchiveRequest) -> WorkflowManifest:
    """Returns the manifest of a workflow."""
    return WorkflowManifest(Workflow(request.workflow_name, request.spec_file, request.handler))


def check_name(kind: str, name: str) -> None:
    """Refuses a name of a "Model" or "Workflow" that the server would refuse.

    Raises:
        ArchiverError: it has characters that are not allowed.
    """
    if _NAME.match(name) is None:
        raise ArchiverError(
            f"{kind} name contains special characters.\n"
            f"The allowed regular expression filter for {kind.lower()} name is: {_NAME_RULE}"
        )


def output_path(export_path: str, file_name: str, *, made: bool = True) -> Path:
    """Returns the path of the archive. `made`: a missing directory is made, as TorchServe does for models only.

    Raises:
        ArchiverError: the directory is missing, cannot be made, or is a file.
    """
    directory = Path(export_path)
    if made and not directory.exists():
        log.warning("Export directory (%s) does not exist. Creating...", export_path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArchiverError(f"Export directory ({export_path}) cannot be created: {error}") from error
    if not directory.is_dir():
        raise ArchiverError(
            f"Given export-path {export_path} is not a directory. Point to a valid export-path directory."
        )
    return directory / file_name


def check_overwrite(output: Path | str, force: bool, kind: str) -> None:
    """Refuses to overwrite an archive, or warns of it where `force` is set.

    Raises:
        ArchiverError: it exists, and `force` is not set.
    """
    if not os.path.exists(output):
        return
    if not force:
        raise ArchiverError(
            f"{output} already exists.\nPlease specify --force/-f option to overwrite the {kind} archive "
            "output file.\nSee -h/--help for more details."
        )
    log.warning("Overwriting %s ...", output)


def find_handler_file(handler: str, runtime: str) -> Path | None:
    """Returns the file that a handler lives in, None for one that the server brings along.

    Raises:
        MissingFileError: there is no such file, and the name is nearly that of a bundled handler.
    """
    bundled = LSP_HANDLERS if runtime == "LSP" else BUNDLED_HANDLERS
    if handler in bundled:
        return None
    file = _handler_path(handler, runtime)
    meant = difflib.get_close_matches(handler, bundled, n=1, cutoff=0.8)
    if meant and not file.exists():
        raise MissingFileError(f"File does not exist: {file} (did you mean the bundled handler {meant[0]}?)")
    return file


def _handler_path(handler: str, runtime: str) -> Path:
    path = handler.rpartition(":")[0] or handler
    if runtime == "LSP":
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        return Path(path if suffix in path else path + suffix)
    return Path(path if path.endswith(".py") else path + ".py")


def add_files(contents: Contents, *files: str | Path | None) -> None:
    """Adds those of the files that are given.

    Raises:
        MissingFileError: one does not exist.
    """
    for file in files:
        if file:
            contents.add_file(Path(file))


def add_extra_files(contents: Contents, extra_files: str | None) -> None:
    """Adds what a comma-separated list of files, directories and wildcards names.

    Raises:
        MissingFileError: a file that is no wildcard does not exist.
    """
    for given in (extra_files or "").split(","):
        pattern = given.strip()
        if not pattern:
            continue
        found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        if not found and not glob.has_magic(pattern):
            raise MissingFileError(f"File does not exist: {pattern}")
        if not found:
            log.warning("--extra-files: no file matches %s", pattern)
        for name in found:
            path = Path(name)
            if path.is_dir():
                contents.add_tree(path)
            else:
                contents.add_file(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `torch-model-archiver` with `arguments`, by default those of this process; returns the exit status."""
    options = vars(model_parser().parse_args(arguments))
    return _run(lambda: create_model_archive(ModelArchiveRequest(**options)))


def workflow_main(arguments: Sequence[str] | None = None) -> int:
    """Runs `torch-workflow-archiver`; returns the exit status."""
    options = vars(workflow_parser().parse_args(arguments))
    return _run(lambda: create_workflow_archive(WorkflowArchiveRequest(**options)))


def _run(create: Callable[[], Path]) -> int:
    """Runs one of the two, with its messages on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s - %(message)s", force=True)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        create()
    except ArchiverError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        log.error("Failed to read the files to archive: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("Interrupted: no archive was written.")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Leaves through the exits that remove the unfinished file."""
    sys.exit(128 + signum)


def model_parser() -> argparse.ArgumentParser:
    """Returns the flags of `torch-model-archiver`."""
    parser = argparse.ArgumentParser(prog="torch-model-archiver", description="Torch Model Archiver Tool")
    add = parser.add_argument
    add("--model-name", required=True, help="name of the model; the archive is named MODEL_NAME.mar")
    add("--serialized-file", help=".pt or .pth file with a state_dict (eager mode) or a TorchScript module")
    add("--model-file", help="Python file with the one class of the model's architecture (eager mode only)")
    add("--handler", required=True, help="handler: FILE, FILE:FUNCTION, or the name of a bundled one")
    runtimes = ["python", "python3", "LSP"]
    add("--runtime", default="python", choices=runtimes, help="what runs the handler (default: python)")
    add(
        "--archive-format",
        default="default",
        choices=["tgz", "no-archive", "zip-store", "default"],
        help="tgz: MODEL_NAME.tar.gz; no-archive: directory MODEL_NAME; zip-store: MODEL_NAME.mar without "
        "compression; default: MODEL_NAME.mar",
    )
    add("-v", "--version", required=True, help="version of the model")
    add("-r", "--requirements-file", help="requirements.txt with the Python packages that the model needs")
    add("-c", "--config-file", help="model-config.yaml with the model's settings")
    add("--extra-files", help="comma-separated files, directories (their contents are added) and wildcards")
    add("--export-path", default=os.getcwd(), help="directory for the archive (default: the current one)")
    add("-f", "--force", action="store_true", help="overwrite an existing archive")
    return parser


def workflow_parser() -> argparse.ArgumentParser:
    """Returns the flags of `torch-workflow-archiver`."""
    parser = argparse.ArgumentParser(
        prog="torch-workflow-archiver",
        description="Torch Workflow Archiver Tool",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--workflow-name",
        required=True,
        help="Exported workflow name. Exported file will be named as workflow-name.war and saved in current working "
        "directory if no --export-path is specified, else it will be saved under the export path",
    )
    add("--spec-file", required=True, help="Path to .yaml file containing workflow DAG specification.")
    add("--handler", help="Path to python file containing workflow's pre-process and post-process logic.")
    add(
        "--export-path",
        default=os.getcwd(),
        help="Path where the exported .war file will be saved.This is an optional parameter. If --export-path is not "
        "specified, the file will be saved in the current working directory. ",
    )
    add(
        "-f",
        "--force",
        action="store_true",
        help="When the -f or --force flag is specified, an existing .war file with same name as that provided in "
        "--workflow-name in the path specified by --export-path will be overwritten",
    )
    add("--extra-files", help="Comma separated path to extra dependency files.")
    return parser
