"""Workflow archives: found, unpacked, checked, and nothing left of what is refused."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.archive.download import DownloadRules
from wsgi_ts.archive.entries import ArchiveLimits
from wsgi_ts.errors import BadRequest, InvalidDag, InvalidWorkflow, ServerError, WorkflowNotFound
from wsgi_ts.workflows.war import (
    WorkflowDirectory,
    discard_workflow,
    open_workflow,
    workflow_from,
)

MANIFEST: dict[str, Any] = {
    "createdOn": "11/29/2020",
    "archiverVersion": "0.2.15",
    "description": "by hand",
    "workflow": {"handler": "f.py", "specFile": "s.yaml", "workflowName": "flow"},
}
SPEC = "models: {}\ndag: {a: [b]}\n"
_ABSENT = object()


def make(path: Path, manifest: object = MANIFEST, files: dict[str, str] | None = None) -> Path:
    """A workflow archive; `manifest` is the object, or the text of the file, or nothing."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files if files is not None else {"s.yaml": SPEC, "f.py": "def a(): ..."}).items():
            archive.writestr(name, text)
        if manifest is not _ABSENT:
            text = manifest if isinstance(manifest, str) else json.dumps(manifest)
            archive.writestr("WAR-INF/MANIFEST.json", text)
    return path


def opened(tmp_path: Path, url: str = "flow.war", **more: Any) -> WorkflowDirectory:
    return open_workflow(url, tmp_path, tmp_path / "workflows", **more)


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "workflows").glob("*")]


def test_a_zip_is_opened_and_removed(tmp_path: Path) -> None:
    make(tmp_path / "flow.war")
    found = opened(tmp_path, "somewhere/flow.war")
    assert (found.name, found.url, found.downloaded) == ("flow", "somewhere/flow.war", None)
    assert found.path.parent == tmp_path / "workflows" and stat.S_IMODE(found.path.stat().st_mode) == 0o700
    assert found.handler_file == found.path / "f.py"
    assert found.read_spec().dag_text == "{a=[b]}"
    assert found.manifest == MANIFEST
    discard_workflow(found)
    discard_workflow(found)
    assert left(tmp_path) == [] and (tmp_path / "flow.war").exists()


def test_the_call_names_the_workflow(tmp_path: Path) -> None:
    make(tmp_path / "flow.war")
    assert opened(tmp_path, workflow_name="other").name == "other"
    with pytest.raises(BadRequest, match="Workflow name is not allowed"):
        opened(tmp_path, workflow_name="a/b")


def test_the_call_names_a_workflow_without_a_name(tmp_path: Path) -> None:
    make(tmp_path / "flow.war", {**MANIFEST, "workflow": {"specFile": "s.yaml"}})
    assert opened(tmp_path, workflow_name="other").name == "other"
    make(tmp_path / "bare.war", _ABSENT)
    with pytest.raises(InvalidWorkflow, match="Workflow archive version is not defined"):
        opened(tmp_path, "bare.war", workflow_name="other")


def test_of_a_tar_the_first_folder_is_dropped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "flow.tar.gz", "w:gz") as archive:
        for name, text in {"x/WAR-INF/MANIFEST.json": json.dumps(MANIFEST), "x/s.yaml": SPEC}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    assert opened(tmp_path, "flow.tar.gz").read_spec().start == "a"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (_ABSENT, "Workflow name is not defined."),
        ({}, "Workflow name is not defined."),
        ({"workflow": None}, "Missing Workflow entry in manifest file."),
        ({**MANIFEST, "workflow": {"specFile": "s.yaml"}}, "Workflow name is not defined."),
        ({key: MANIFEST[key] for key in ("workflow", "createdOn")}, "Workflow archive version is not defined."),
        ({key: MANIFEST[key] for key in ("workflow", "archiverVersion")}, "Workflow archive createdOn is not defined."),
        ({**MANIFEST, "workflow": {"workflowName": "w"}}, "Workflow specification is not defined."),
        ("{", "Failed to parse signature.json."),
        ("[]", "Failed to parse signature.json."),
        ({"workflow": []}, "Failed to parse signature.json."),
        ({**MANIFEST, "workflow": {"workflowName": []}}, "Failed to parse signature.json."),
        ('"' + "x" * (1 << 20) + '"', "Failed to parse signature.json."),
    ],
)
def test_a_wrong_manifest_is_500_with_the_text_of_torchserve(tmp_path: Path, manifest: object, message: str) -> None:
    make(tmp_path / "flow.war", manifest)
    with pytest.raises(InvalidWorkflow) as caught:
        opened(tmp_path)
    assert caught.value.to_dict() == {"code": 500, "type": "InvalidWorkflowException", "message": message}
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "Workflow not found at: "),
        ("none.war", "Workflow not found in workflow store: none.war"),
        ("a\0b.war", "Workflow not found in workflow store: a\0b.war"),
        ("../flow.war", "Relative path is not allowed in url: ../flow.war"),
        ("folder", "Workflow not found at: folder"),
        ("https://example.org/flow.war", "Given URL https://example.org/flow.war does not match any allowed URL(s)"),
    ],
)
def test_what_is_not_there(tmp_path: Path, url: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WorkflowNotFound) as caught:
        opened(tmp_path, url, rules=DownloadRules((r"file://.*",)))
    assert (caught.value.status, caught.value.message) == (404, message)


def test_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(WorkflowNotFound, match=r"Workflow store has not been configured\."):
        open_workflow("flow.war", None, tmp_path)


def test_a_file_url_is_fetched_once_and_removed_with_a_refusal(tmp_path: Path) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    store.mkdir()
    elsewhere.mkdir()
    url = make(elsewhere / "flow.war").as_uri()
    found = open_workflow(url, store, tmp_path / "workflows")
    assert found.downloaded == store / "flow.war"
    with pytest.raises(ServerError) as caught:
        open_workflow(url, store, tmp_path / "workflows")
    expected = {"code": 500, "type": "FileAlreadyExistsException", "message": "flow.war"}
    assert caught.value.to_dict() == expected
    discard_workflow(found)
    make(elsewhere / "flow.war", {})
    with pytest.raises(InvalidWorkflow):
        open_workflow(url, store, tmp_path / "workflows")
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("name", ["s.yaml", "y" * 300])
def test_a_specification_that_is_not_there(tmp_path: Path, name: str) -> None:
    make(tmp_path / "flow.war", {**MANIFEST, "workflow": {**MANIFEST["workflow"], "specFile": name}}, {"f.py": ""})
    with pytest.raises(ServerError) as caught:
        opened(tmp_path).read_spec()
    assert caught.value.to_dict() == {"code": 500, "type": "NoSuchFileException", "message": name}


def test_a_specification_that_is_none_or_too_large(tmp_path: Path) -> None:
    make(tmp_path / "flow.war", files={"s.yaml": "models: {}\ndag: {a: 5}"})
    with pytest.raises(InvalidDag, match=r"^s\.yaml:2: key dag.a"):
        opened(tmp_path).read_spec()
    with pytest.raises(InvalidWorkflow, match=r"Failed to parse yaml\."):
        opened(tmp_path).read_spec(ArchiveLimits(max_config_bytes=5))


@pytest.mark.parametrize("name", ["../s.yaml", "/etc/passwd", "a\\..\\s.yaml"])
@pytest.mark.parametrize("key", ["specFile", "handler"])
def test_an_entry_that_leaves_the_directory_is_refused(tmp_path: Path, key: str, name: str) -> None:
    make(tmp_path / "flow.war", {**MANIFEST, "workflow": {**MANIFEST["workflow"], key: name}})
    with pytest.raises(InvalidWorkflow, match=f"Manifest entry {key} leaves") as caught:
        opened(tmp_path)
    assert caught.value.status == 400 and left(tmp_path) == []


def test_archives_that_are_not_safe_or_not_sound(tmp_path: Path) -> None:
    make(tmp_path / "flow.war", files={"../out.yaml": SPEC})
    with pytest.raises(InvalidWorkflow, match="leaves the workflow's directory") as caught:
        opened(tmp_path)
    assert caught.value.status == 400
    (tmp_path / "flow.war").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(InvalidWorkflow, match="Workflow archive is damaged"):
        opened(tmp_path)
    (tmp_path / "flow.war").write_text("<html>")
    with pytest.raises(InvalidWorkflow, match=r"neither zip nor tar\.gz: it looks like an HTML page"):
        opened(tmp_path)
    make(tmp_path / "flow.war", files={"s.yaml": " " * 10_000})
    with pytest.raises(InvalidWorkflow, match="Workflow archive is too large"):
        opened(tmp_path, limits=ArchiveLimits(max_archive_bytes=1000))
    assert left(tmp_path) == []


def test_a_file_or_directory_wherever_it_lies(tmp_path: Path) -> None:
    with workflow_from(make(tmp_path / "flow.war")) as flow:
        assert flow.name == "flow" and flow.read_spec().start == "a"
        unpacked = flow.path
    assert not unpacked.exists()
    with zipfile.ZipFile(tmp_path / "flow.war") as archive:
        archive.extractall(tmp_path / "open")
    with workflow_from(tmp_path / "open") as flow:
        assert (flow.path, flow.extracted) == (tmp_path / "open", False)
        discard_workflow(flow)
    assert (tmp_path / "open" / "s.yaml").exists()
    with pytest.raises(FileNotFoundError), workflow_from(tmp_path / "none.war"):
        pass
