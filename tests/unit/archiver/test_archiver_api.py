"""The archivers' Python interface, by the import paths that build scripts use."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import model_archiver
import workflow_archiver
from model_archiver import ModelArchiver, ModelArchiverConfig
from model_archiver.arg_parser import ArgParser
from model_archiver.manifest_components.manifest import Manifest, RuntimeType
from model_archiver.manifest_components.model import Model
from model_archiver.model_archiver_error import ModelArchiverError
from model_archiver.model_packaging import generate_model_archive, package_model
from model_archiver.model_packaging_utils import ModelExportUtils, archiving_options, model_handlers
from workflow_archiver.arg_parser import ArgParser as WorkflowArgParser
from workflow_archiver.manifest_components.manifest import Manifest as WorkflowManifest
from workflow_archiver.manifest_components.workflow import Workflow
from workflow_archiver.workflow_archiver_error import WorkflowArchiverError
from workflow_archiver.workflow_packaging import generate_workflow_archive, package_workflow
from workflow_archiver.workflow_packaging_utils import WorkflowExportUtils


@pytest.fixture(autouse=True)
def _no_handler_of_the_log_stays() -> Iterator[None]:
    """The commands set up logging to a stream that ends with their test."""
    before = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = before


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    (folder / "extra").mkdir(parents=True)
    for name in ("handler.py", "weights.pt", "extra/labels.json", "requirements.txt", "flow.yaml"):
        (folder / name).write_text(name)
    return folder


def config(files: Path, output: Path, **fields: object) -> ModelArchiverConfig:
    values = {
        "model_name": "m",
        "handler": str(files / "handler.py"),
        "version": "1.0",
        "serialized_file": str(files / "weights.pt"),
        "extra_files": str(files / "extra"),
        "export_path": str(output),
        **fields,
    }
    return ModelArchiverConfig(**values)  # type: ignore[arg-type]


def test_an_archive_is_written(files: Path, tmp_path: Path) -> None:
    ModelArchiver.generate_model_archive(config(files, tmp_path))
    with zipfile.ZipFile(tmp_path / "m.mar") as archive:
        assert sorted(archive.namelist()) == ["MAR-INF/MANIFEST.json", "handler.py", "labels.json", "weights.pt"]
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert manifest["archiverVersion"] == "0.12.0"
    assert manifest["model"] == {
        "modelName": "m",
        "serializedFile": "weights.pt",
        "handler": "handler.py",
        "modelVersion": "1.0",
    }
    with pytest.raises(ModelArchiverError, match=r"m\.mar already exists"):
        generate_model_archive(config(files, tmp_path))
    generate_model_archive(config(files, tmp_path, force=True))


def test_a_given_manifest_is_packed_as_it_is(files: Path, tmp_path: Path) -> None:
    package_model(config(files, tmp_path, archive_format="tgz"), '{"mine": true}')
    with tarfile.open(tmp_path / "m.tar.gz") as archive:
        member = archive.extractfile("m/MAR-INF/MANIFEST.json")
        assert member is not None
        assert member.read() == b'{"mine": true}'


def test_a_command_line_becomes_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--model-name", "m", "--handler", "h.py", "-v", "2", "--export-path", str(tmp_path), "-f"]
    monkeypatch.setattr(sys, "argv", ["torch-model-archiver", *line])
    made = ArgParser.export_model_args_parser()
    assert made == ModelArchiverConfig("m", "h.py", "2", export_path=str(tmp_path), force=True)


def test_the_parts_of_a_manifest() -> None:
    model = Model("m", handler="a/h.py:f", model_version="1", extensions={"x": 1})
    assert json.loads(str(model)) == {
        "modelName": "m",
        "handler": "h.py:f",
        "modelVersion": "1",
        "extensions": {"x": 1},
    }
    manifest = json.loads(str(Manifest(RuntimeType.PYTHON3.value, model)))
    assert manifest["runtime"] == "python3"
    with pytest.raises(ValueError, match="ruby"):
        Manifest("ruby", model)


def test_the_steps_of_packaging(files: Path, tmp_path: Path) -> None:
    assert archiving_options["tgz"] == ".tar.gz"
    assert model_handlers["image_classifier"] == "vision"
    tools = ModelExportUtils
    assert tools.get_archive_export_path("/e", "m", "zip-store") == "/e/m.mar"
    assert tools.check_mar_already_exists("m", str(tmp_path), False) == str(tmp_path)
    assert tools.find_unique(["a.pt", "b.py"], ".pt") == "a.pt"
    assert tools.find_unique([], ".pt") is None
    with pytest.raises(ModelArchiverError, match=r"expects only one \.pt file in the folder. Found 2 files"):
        tools.find_unique(["a.pt", "b.pt"], ".pt")
    for name in ("m", "m.1-x_y"):
        tools.validate_inputs(name, str(tmp_path))
    with pytest.raises(ModelArchiverError, match="special characters"):
        tools.check_model_name_regex_or_exit("m/n")
    assert not tools.directory_filter(".git", ["x"])
    assert not tools.directory_filter("x", ["x"])
    assert tools.directory_filter("y", ["x"])
    names = ("n", "a.pyc", ".DS_Store", "MANIFEST.json", "m.mar", ".hidden", "a.py")
    assert [tools.file_filter(name, {"n"}) for name in names] == [*[False] * 5, True, True]
    assert tools.generate_model(config(files, tmp_path)).handler == "handler.py"
    bundled = tools.copy_artifacts("m", "python", handler="image_classifier")
    assert list(Path(bundled).iterdir()) == []
    staging = tools.copy_artifacts(
        "m", "python", handler=str(files / "handler.py:f"), extra_files=str(files / "extra"), model_file=None
    )
    assert sorted(path.name for path in Path(staging).iterdir()) == ["handler.py", "labels.json"]
    with pytest.raises(FileNotFoundError, match="does not exist: none"):
        tools.copy_artifacts("m", "python", extra_files="none")
    tools.archive(str(tmp_path), "m", staging, "{}", "default")
    with zipfile.ZipFile(tmp_path / "m.mar") as archive:
        assert archive.read("MAR-INF/MANIFEST.json") == b"{}"
    tools.archive_dir(staging, str(tmp_path / "n.mar"), "zip-store", "n")
    with zipfile.ZipFile(tmp_path / "n.mar") as archive:
        assert sorted(archive.namelist()) == ["handler.py", "labels.json"]
    with zipfile.ZipFile(tmp_path / "o.mar", "w") as archive, tarfile.open(tmp_path / "o.tar.gz", "w:gz") as tar:
        tools.archive_dir(staging, archive, "default", "o")
        tools.archive_dir(staging, tar, "tgz", "o")
        assert sorted(archive.namelist()) == ["handler.py", "labels.json"]
        assert sorted(tar.getnames()) == ["o/handler.py", "o/labels.json"]
    tools.clean_temp_files([str(Path(staging) / "handler.py")])
    assert [path.name for path in Path(staging).iterdir()] == ["labels.json"]
    shutil.rmtree(staging)
    shutil.rmtree(bundled)


def test_scripts_replace_the_steps_of_packaging_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = [mock.MagicMock() for _ in range(3)]
    for name, step in zip(("ArgParser", "ModelExportUtils", "package_model"), steps, strict=True):
        monkeypatch.setattr(f"model_archiver.model_packaging.{name}", step)
    manifest = steps[1].generate_manifest_json.return_value
    generate_model_archive()
    steps[2].assert_called_with(steps[0].export_model_args_parser.return_value, manifest=manifest)
    made = config(tmp_path, tmp_path)
    ModelArchiver.generate_model_archive(made)
    steps[2].assert_called_with(made, manifest=manifest)
    monkeypatch.setattr("shutil.rmtree", mock.Mock())
    package_model(made, "{}")
    steps[1].validate_inputs.assert_called_once_with("m", str(tmp_path))
    directory, staging = steps[1].check_mar_already_exists.return_value, steps[1].copy_artifacts.return_value
    steps[1].archive.assert_called_once_with(directory, "m", staging, "{}", "default")


def test_the_model_archive_is_looked_for_once() -> None:
    for is_there in (False, True):
        exists = mock.Mock(return_value=is_there)
        with mock.patch("os.path.exists", exists), mock.patch("os.getcwd", return_value="/dummy"):
            assert ModelExportUtils.check_mar_already_exists("some-model", None, True, "tgz") == "/dummy"
        exists.assert_called_once_with("/dummy/some-model.tar.gz")


def test_a_packaged_model_leaves_nothing_behind(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "staging"))
    (tmp_path / "staging").mkdir()
    with pytest.raises(ModelArchiverError, match="does not exist"):
        ModelArchiver.generate_model_archive(config(files, tmp_path, serialized_file="none.pt"))
    ModelArchiver.generate_model_archive(config(files, tmp_path))
    assert (tmp_path / "m.mar").is_file()
    assert list((tmp_path / "staging").iterdir()) == []


def test_the_archivers_name_their_versions() -> None:
    assert model_archiver.__version__ == "0.12.0"


def test_a_workflow_is_packaged(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--workflow-name", "w", "--spec-file", str(files / "flow.yaml"), "--export-path", str(tmp_path)]
    line += ["--handler", str(files / "handler.py")]
    args = WorkflowArgParser.workflow_archiver_args_parser().parse_args(line)
    assert json.loads(str(WorkflowManifest(Workflow("w", "a/flow.yaml", "handler.py"))))["workflow"] == {
        "workflowName": "w",
        "specFile": "flow.yaml",
        "handler": "handler.py",
    }
    package_workflow(args, WorkflowExportUtils.generate_manifest_json(args))
    with zipfile.ZipFile(tmp_path / "w.war") as archive:
        assert sorted(archive.namelist()) == ["WAR-INF/MANIFEST.json", "flow.yaml", "handler.py"]
    with pytest.raises(WorkflowArchiverError, match="already exists"):
        WorkflowExportUtils.check_war_already_exists("w", str(tmp_path), False)
    assert WorkflowExportUtils.check_war_already_exists("w", str(tmp_path), True) == str(tmp_path)
    WorkflowExportUtils.validate_inputs("w", str(tmp_path))
    with pytest.raises(WorkflowArchiverError, match="special characters"):
        WorkflowExportUtils.check_workflow_name_regex_or_exit("w w")
    with pytest.raises(WorkflowArchiverError, match=r"^Given export-path /none is not a directory. Point to a valid"):
        WorkflowExportUtils.validate_inputs("w", "/none")
    monkeypatch.setattr(sys, "argv", ["torch-workflow-archiver", *line])
    with pytest.raises(SystemExit, match="1"):
        generate_workflow_archive()


def test_scripts_replace_the_steps_of_packaging_a_workflow(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [mock.MagicMock() for _ in range(3)]
    for name, step in zip(("ArgParser", "WorkflowExportUtils", "package_workflow"), steps, strict=True):
        monkeypatch.setattr(f"workflow_archiver.workflow_packaging.{name}", step)
    generate_workflow_archive()
    parsed = steps[0].workflow_archiver_args_parser.return_value.parse_args.return_value
    steps[2].assert_called_once_with(parsed, manifest=steps[1].generate_manifest_json.return_value)
    args = argparse.Namespace(
        workflow_name="my-workflow",
        spec_file="s/",
        handler="a.py",
        export_path="/dummy/",
        force=False,
        extra_files=None,
    )
    package_workflow(args, WorkflowExportUtils.generate_manifest_json(args))
    steps[1].validate_inputs.assert_called_once_with("my-workflow", "/dummy/")
    steps[1].archive.assert_called_once()
    steps[1].clean_temp_files.assert_called_once()


def test_the_workflow_archive_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_there in (False, True):
        exists = mock.Mock(return_value=is_there)
        with mock.patch("os.path.exists", exists), mock.patch("os.getcwd", return_value="/dummy"):
            assert WorkflowExportUtils.check_war_already_exists("some-workflow", None, True) == "/dummy"
        exists.assert_called_once_with("/dummy/some-workflow.war")
    with mock.patch("os.remove") as remove:
        WorkflowExportUtils.clean_temp_files(["a", "b", "c"])
    assert remove.call_count == 3


def test_the_steps_of_packaging_a_workflow(files: Path, tmp_path: Path) -> None:
    tools = WorkflowExportUtils
    args = argparse.Namespace(workflow_name="w", spec_file="a/spec.yaml", handler="b/a.py")
    made = tools.generate_workflow(args)
    assert (made.workflow_name, made.spec_file, made.handler) == ("w", "spec.yaml", "a.py")
    assert tools.generate_manifest_json(args).startswith('{\n  "createdOn": "')
    assert (
        json.loads(tools.generate_manifest_json(args))["archiverVersion"] == workflow_archiver.__version__ == "0.2.15"
    )
    names = ("abc.onnx", "abc.pyc", ".DS_Store", "MANIFEST.json", "w.war", "abc.mxnet", ".hidden")
    assert [tools.file_filter(name, {"abc.onnx"}) for name in names] == [*[False] * 5, True, True]
    staging = tools.copy_artifacts(
        "w", [str(files / "flow.yaml"), None, f"{files / 'handler.py'},{files / 'weights.pt'}"]
    )
    again = tools.copy_artifacts("w", [])
    assert again != staging
    (Path(staging) / "__pycache__").mkdir()
    (Path(staging) / "__pycache__" / "x.pyc").touch()
    tools.archive(str(tmp_path), "w", staging, "{}")
    with zipfile.ZipFile(tmp_path / "w.war") as archive:
        assert sorted(archive.namelist()) == ["WAR-INF/MANIFEST.json", "flow.yaml", "handler.py", "weights.pt"]
    with zipfile.ZipFile(tmp_path / "x.war", "w") as archive:
        tools.archive_dir(staging, archive)
        assert sorted(archive.namelist()) == ["flow.yaml", "handler.py", "weights.pt"]
    tools.clean_temp_files([staging, again])
    assert not Path(staging).exists()


def test_a_packaged_workflow_leaves_nothing_behind(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "staging"))
    (tmp_path / "staging").mkdir()
    command = ["x", "--workflow-name", "w", "--spec-file", str(files / "none.yaml"), "--export-path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="1"):
        generate_workflow_archive()
    monkeypatch.setattr(sys, "argv", [*command, "--spec-file", str(files / "flow.yaml")])
    generate_workflow_archive()
    assert (tmp_path / "w.war").is_file()
    assert list((tmp_path / "staging").iterdir()) == []


def test_the_module_is_a_command(files: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "m", "-v", "1"]
    command += ["--handler", str(files / "handler.py"), "--export-path", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    assert (tmp_path / "m.mar").is_file()


def test_compression_can_be_patched_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h.py").write_text("def handle(data, context): return data\n" * 50)
    real = zipfile.ZipFile
    stored = "model_archiver.model_packaging_utils.zipfile.ZipFile"
    monkeypatch.setattr(stored, lambda file, mode, _: real(file, mode, zipfile.ZIP_STORED))
    config = ModelArchiverConfig(
        model_name="m", handler=str(tmp_path / "h.py"), version="1", export_path=str(tmp_path), archive_format="default"
    )
    ModelArchiver.generate_model_archive(config)
    with real(tmp_path / "m.mar") as archive:
        assert archive.getinfo("h.py").compress_size == archive.getinfo("h.py").file_size
