"""From the `url` of a registration, or a file, to an unpacked workflow with a checked manifest and specification."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from wsgi_ts.archive.download import DownloadRules, fetch_archive, is_fetched
from wsgi_ts.archive.entries import DEFAULT_LIMITS, ArchiveLimits, escape_name
from wsgi_ts.archive.manifest import check_name, parsed_as, read_json_object, read_small_file, text_of
from wsgi_ts.archive.model_directory import unpack
from wsgi_ts.errors import InternalServerError, InvalidModel, InvalidWorkflow, ModelNotFound, WorkflowNotFound
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.workflows.spec import WorkflowSpec, parse_spec

log = logging.getLogger(__name__)

#: Where an archive has its manifest.
MANIFEST_PATH = PurePosixPath("WAR-INF", "MANIFEST.json")


@dataclass(frozen=True, slots=True)
class WorkflowDirectory:
    """A workflow on disk.

    Attributes:
        path: absolute directory with its files.
        name: as registered: the call's name, or the manifest's.
        url: as registered.
        spec_file: the specification.
        handler_file: the file with the functions; None where the manifest names none.
        manifest: MANIFEST.json as it stands in the archive.
        extracted: whether `path` was made for it, and is removed with it.
        downloaded: the file that was fetched into the workflow store for it, if any.
    """

    path: Path
    name: str
    url: str
    spec_file: Path
    handler_file: Path | None
    manifest: dict[str, Any]
    extracted: bool
    downloaded: Path | None = None

    def spec_text(self, limits: ArchiveLimits = DEFAULT_LIMITS) -> str:
        """The text of the specification.

        Raises:
            InternalServerError: the archive has no such file.
            InvalidWorkflow: it is too large.
        """
        if not os.path.isfile(self.spec_file):
            name = self.spec_file.relative_to(self.path)
            raise InternalServerError(str(name), type_name="NoSuchFileException")
        content = read_small_file(self.spec_file, limits.max_config_bytes)
        if content is None:
            raise InvalidWorkflow("Failed to parse yaml.")
        return content.decode("utf-8", "replace").removeprefix("\ufeff")

    def read_spec(self, limits: ArchiveLimits = DEFAULT_LIMITS) -> WorkflowSpec:
        """The checked specification.

        Raises:
            InternalServerError: the archive has no such file.
            InvalidWorkflow: it is no YAML, or too large.
            InvalidDag: it is no specification.
        """
        return parse_spec(self.spec_text(limits), self.spec_file.name)


def open_workflow(
    url: str,
    workflow_store: Path | None,
    workflows_dir: Path,
    *,
    limits: ArchiveLimits = DEFAULT_LIMITS,
    rules: DownloadRules | None = None,
    workflow_name: str | None = None,
) -> WorkflowDirectory:
    """Finds, fetches and unpacks the workflow at `url`, and checks its manifest; whatever fails, nothing is left.

    The arguments are those of `open_archive`. `WorkflowDirectory.read_spec` reads the specification; who gives up then
    calls `discard_workflow`.

    Raises:
        WorkflowNotFound: nothing there, or a URL that is not allowed.
        DownloadFailed: the URL could not be fetched.
        InvalidWorkflow: the archive or its manifest is wrong, or not safe.
        BadRequest: the name cannot be part of an address.
        OutOfResources: the disk is full.
        InternalServerError: the store already has a file of that name, or a file operation failed.
    """
    with contextlib.ExitStack() as undo:
        try:
            source, fetched = _locate(url, workflow_store, rules or DownloadRules(), limits)
            if fetched:
                undo.callback(source.unlink, missing_ok=True)
            directory = _unpack(source, workflows_dir, limits, undo)
            found = _directory(directory, url, limits, workflow_name, source if fetched else None, extracted=True)
        except OSError as error:
            log.error("Failed to open the workflow archive %s: %s", escape_name(url), error)
            raise InternalServerError(f"Failed to save workflow: {url}") from error
        undo.pop_all()
    return found


@contextlib.contextmanager
def workflow_from(path: Path) -> Iterator[WorkflowDirectory]:
    """A workflow from a .war file or the directory of one that was unpacked, wherever it lies; for the commands.

    What was unpacked goes when the block is left.

    Raises:
        InvalidWorkflow: it is no workflow, or not a safe one.
        OutOfResources: the disk is full.
        OSError: it cannot be read.
    """
    with contextlib.ExitStack() as undo:
        extracted = not path.is_dir()
        directory = path.absolute()
        if extracted:
            scratch = undo.enter_context(tempfile.TemporaryDirectory(prefix="wsgi-ts-workflow-"))
            directory = _unpack(path, Path(scratch), DEFAULT_LIMITS, undo)
        yield _directory(directory, path.name, DEFAULT_LIMITS, None, None, extracted=extracted)


def discard_workflow(workflow: WorkflowDirectory) -> None:
    """Deletes what was unpacked, and the file that was fetched, so that its URL can be registered again.

    For a workflow that is not registered (any more). A directory that was used in place stays.
    """
    try:
        if workflow.extracted:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(workflow.path)
        if workflow.downloaded is not None:
            workflow.downloaded.unlink(missing_ok=True)
    except OSError as error:
        log.warning("Cannot remove the unpacked workflow %s: %s", workflow.path, error)


def _locate(url: str, workflow_store: Path | None, rules: DownloadRules, limits: ArchiveLimits) -> tuple[Path, bool]:
    """The archive, and whether it was fetched for this call."""
    if workflow_store is None:
        raise WorkflowNotFound("Workflow store has not been configured.")
    fetched = is_fetched(url, rules)
    if fetched and not rules.match(url):
        raise WorkflowNotFound(f"Given URL {url} does not match any allowed URL(s)")
    if ".." in (url.partition("?")[0] if fetched else url):
        raise WorkflowNotFound(f"Relative path is not allowed in url: {url}")
    if fetched:
        return _fetch(url, workflow_store, rules, limits), True
    found = Path(os.path.join(workflow_store, os.path.basename(url)))
    # Of names that no file can have `Path.exists` raises.
    if not os.path.exists(found):
        raise WorkflowNotFound(f"Workflow not found in workflow store: {url}")
    if not os.path.isfile(found):
        raise WorkflowNotFound(f"Workflow not found at: {url}")
    return found, False


def _fetch(url: str, workflow_store: Path, rules: DownloadRules, limits: ArchiveLimits) -> Path:
    try:
        return fetch_archive(url, workflow_store, rules, limits)
    except ModelNotFound as error:
        raise WorkflowNotFound(error.message) from error
    except InternalServerError as error:
        if isinstance(error.__cause__, FileExistsError):
            name = os.path.basename(url.partition("?")[0])
            raise InternalServerError(name, type_name="FileAlreadyExistsException") from error
        raise


def _unpack(source: Path, workflows_dir: Path, limits: ArchiveLimits, undo: contextlib.ExitStack) -> Path:
    try:
        return unpack(source, workflows_dir, limits, undo)
    except InvalidModel as error:
        message = error.message.replace("Model archive", "Workflow archive")
        raise InvalidWorkflow(message.replace("the model dir", "the workflow's dir"), status=400) from error


@parsed_as(InvalidWorkflow, MANIFEST_PATH)
def _directory(
    directory: Path, url: str, limits: ArchiveLimits, name: str | None, downloaded: Path | None, *, extracted: bool
) -> WorkflowDirectory:
    """The workflow in a directory, by its checked manifest."""
    file = directory / MANIFEST_PATH
    manifest = read_json_object(file, limits.max_manifest_bytes) if os.path.lexists(file) else {}
    # As TorchServe: an entry that is not there is an empty one, and only a null is a missing one.
    workflow = manifest.get("workflow", {})
    if workflow is None:
        raise InvalidWorkflow("Missing Workflow entry in manifest file.")
    if not isinstance(workflow, dict):
        raise ValueError("workflow is not an object")
    name = name or text_of(workflow, "workflowName")
    if name is None:
        raise InvalidWorkflow("Workflow name is not defined.")
    if text_of(manifest, "archiverVersion") is None:
        raise InvalidWorkflow("Workflow archive version is not defined.")
    if text_of(manifest, "createdOn") is None:
        raise InvalidWorkflow("Workflow archive createdOn is not defined.")
    check_name("Workflow name", name)
    spec_file = text_of(workflow, "specFile")
    if not spec_file:
        raise InvalidWorkflow("Workflow specification is not defined.")
    handler = text_of(workflow, "handler")
    return WorkflowDirectory(
        path=directory,
        name=name,
        url=url,
        spec_file=_inside(directory, "specFile", spec_file),
        handler_file=_inside(directory, "handler", handler) if handler else None,
        manifest=manifest,
        extracted=extracted,
        downloaded=downloaded,
    )


def _inside(directory: Path, key: str, value: str) -> Path:
    """The file that an entry of the manifest names.

    Raises:
        InvalidWorkflow: it leaves the directory.
    """
    path = PurePosixPath(value)
    if "\0" in value or "\\" in value or path.is_absolute() or ".." in path.parts:
        message = f"Manifest entry {key} leaves the workflow's directory: {escape_name(value)}"
        raise InvalidWorkflow(message, status=400)
    return directory / path
