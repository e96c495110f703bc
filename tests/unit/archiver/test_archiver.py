"""The two archiver commands: flags, formats, manifest, texts and exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from wsgi_ts.archive.model_directory import open_archive
from wsgi_ts.archiver import pack as archiver
from wsgi_ts.archiver import writer as archive_writer
from wsgi_ts.archiver.writer import ArchiverError


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the files of a small model."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "bge-large-zh"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / ".git").mkdir()
    (model / ".git" / "HEAD").write_text("ref")
    (model / "__pycache__").mkdir()
    (model / "__pycache__" / "handler.pyc").write_text("x")
    (model / ".gitattributes").write_text("*")
    (model / "handler.py").write_text("def handle(data, context):\n    return data\n")
    (model / "pytorch_model.bin").write_bytes(b"weights" * 1000)
    (tmp_path / "model.py").write_text("class Net: ...\n")
    (tmp_path / "requirements.txt").write_text("numpy\n")
    (tmp_path / "model-config.yaml").write_text("minWorkers: 1\n")
    return tmp_path


def names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def manifest(path: Path) -> dict[str, object]:
    with zipfile.ZipFile(path) as archive:
        content: dict[str, object] = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    return content


def run(*arguments: str) -> int:
    return archiver.main(["--model-name", "m", "--version", "1.0", *arguments])


BGE = [
    "-f",
    "--model-name=bge_large_zh",
    "--version=1.0",
    "--serialized-file=bge-large-zh/pytorch_model.bin",
    "--handler=bge-large-zh/handler.py",
    "--extra-files=bge-large-zh/",
]
BGE_FILES = {
    "handler.py",
    "pytorch_model.bin",
    "1_Pooling/config.json",
    ".gitattributes",
    "MAR-INF/MANIFEST.json",
}


def test_whole_directory_as_mar(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert archiver.main(BGE) == 0
    assert names(work / "bge_large_zh.mar") == BGE_FILES
    assert capfd.readouterr().err == ""
    assert [path.name for path in work.iterdir() if path.name.endswith(".part")] == []


def test_no_archive_into_a_missing_export_path(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert archiver.main([*BGE, "--archive-format=no-archive", "--export-path=no-archive"]) == 0
    root = work / "no-archive" / "bge_large_zh"
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == BGE_FILES
    expected = "WARNING - Export directory (no-archive) does not exist. Creating...\n"
    assert capfd.readouterr().err == expected
    opened = open_archive("bge_large_zh", work / "no-archive", work / "models")
    assert (opened.path, opened.extracted) == (root, False)


def test_manifest_to_the_letter(work: Path) -> None:
    status = run(
        *["--serialized-file", "bge-large-zh/pytorch_model.bin", "--model-file", "model.py"],
        *["--handler", "bge-large-zh/handler.py:handle", "-r", "requirements.txt", "-c", "model-config.yaml"],
        *["--runtime", "python3"],
    )
    assert status == 0
    with zipfile.ZipFile(work / "m.mar") as archive:
        text = archive.read("MAR-INF/MANIFEST.json").decode()
        assert archive.namelist()[-1] == "MAR-INF/MANIFEST.json"
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED}
    created = re.search(r'"createdOn": "(\d\d/\d\d/\d{4} \d\d:\d\d:\d\d)"', text)
    assert created is not None
    assert text == (
        "{\n"
        f'  "createdOn": "{created.group(1)}",\n'
        '  "runtime": "python3",\n'
        '  "model": {\n'
        '    "modelName": "m",\n'
        '    "serializedFile": "pytorch_model.bin",\n'
        '    "handler": "handler.py:handle",\n'
        '    "modelFile": "model.py",\n'
        '    "modelVersion": "1.0",\n'
        '    "requirementsFile": "requirements.txt",\n'
        '    "configFile": "model-config.yaml"\n'
        "  },\n"
        '  "archiverVersion": "0.12.0"\n'
        "}"
    )


@pytest.mark.parametrize(
    ("handler", "in_manifest", "packed"),
    [
        ("image_classifier", "image_classifier", None),
        ("base_handler", "base_handler", None),
        ("bge-large-zh/handler.py", "handler.py", "handler.py"),
        ("bge-large-zh/handler", "handler", "handler.py"),
        ("bge-large-zh/handler:handle", "handler:handle", "handler.py"),
        ("bge-large-zh/handler.py:handle", "handler.py:handle", "handler.py"),
    ],
)
def test_handler_forms(work: Path, handler: str, in_manifest: str, packed: str | None) -> None:
    assert run("--handler", handler) == 0
    model = manifest(work / "m.mar")["model"]
    assert isinstance(model, dict)
    assert model["handler"] == in_manifest
    assert names(work / "m.mar") == {"MAR-INF/MANIFEST.json"} | ({packed} if packed else set())


def test_lsp_runtime(work: Path) -> None:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    (work / f"libmy{suffix}").write_bytes(b"\x7fELF")
    assert run("--runtime", "LSP", "--handler", "TorchScriptHandler") == 0
    assert names(work / "m.mar") == {"MAR-INF/MANIFEST.json"}
    assert run("-f", "--runtime", "LSP", "--handler", "libmy:MyHandler") == 0
    assert names(work / "m.mar") == {"MAR-INF/MANIFEST.json", f"libmy{suffix}"}


def test_zip_store(work: Path) -> None:
    arguments = ["--handler", "base_handler", "--serialized-file", "bge-large-zh/pytorch_model.bin"]
    assert run(*arguments, "--archive-format", "zip-store") == 0
    with zipfile.ZipFile(work / "m.mar") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_tgz_lies_below_the_model_name(work: Path) -> None:
    assert run("--handler", "bge-large-zh/handler.py", "--archive-format", "tgz") == 0
    with tarfile.open(work / "m.tar.gz") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == ["m/handler.py", "m/MAR-INF/MANIFEST.json"]
    assert {member.uname for member in members} == {""}
    opened = open_archive("m.tar.gz", work, work / "models")
    assert (opened.path / "handler.py").is_file()


def test_existing_archive(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "m.mar").write_text("old")
    assert run("--handler", "base_handler") == 1
    assert capfd.readouterr().err == (
        f"ERROR - {work}/m.mar already exists.\n"
        "Please specify --force/-f option to overwrite the model archive output file.\n"
        "See -h/--help for more details.\n"
    )
    assert (work / "m.mar").read_text() == "old"
    assert run("--handler", "base_handler", "-f") == 0
    assert capfd.readouterr().err == f"WARNING - Overwriting {work}/m.mar ...\n"
    assert names(work / "m.mar") == {"MAR-INF/MANIFEST.json"}


def test_bad_model_name(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model-name", "a/b", "--version", "1", "--handler", "base_handler"]
    assert archiver.main(arguments) == 1
    assert capfd.readouterr().err == (
        "ERROR - Model name contains special characters.\n"
        "The allowed regular expression filter for model name is: ^[A-Za-z0-9][A-Za-z0-9_\\-.]*$\n"
    )


def test_export_path_is_a_file(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--handler", "base_handler", "--export-path", "model.py") == 1
    expected = "Given export-path model.py is not a directory. Point to a valid export-path directory."
    assert expected in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--handler", "nothere.py"], "File does not exist: nothere.py"),
        (
            ["--handler", "image_clasifier"],
            "File does not exist: image_clasifier.py (did you mean the bundled handler image_classifier?)",
        ),
        (["--handler", "base_handler", "--extra-files", "a.txt"], "File does not exist: a.txt"),
        (["--handler", "base_handler", "--serialized-file", "w.pt"], "File does not exist: w.pt"),
        (
            ["--handler", "base_handler", "--serialized-file", "bge-large-zh"],
            "Not a regular file: bge-large-zh",
        ),
    ],
)
def test_missing_inputs(work: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(*arguments) == 1
    assert capfd.readouterr().err == f"ERROR - {message}\n"
    assert not (work / "m.mar").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--model-name", "m"], ["--model-name", "m", "--version", "1", "--runtime", "ruby"]]
)
def test_wrong_flags_exit_with_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        archiver.main(arguments)
    assert stop.value.code == 2
    assert "usage: torch-model-archiver" in capfd.readouterr().err


def test_wildcards_and_lists(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--handler", "base_handler", "--extra-files", "*.txt, model.p?,nothing*,") == 0
    assert names(work / "m.mar") == {"requirements.txt", "model.py", "MAR-INF/MANIFEST.json"}
    assert capfd.readouterr().err == "WARNING - --extra-files: no file matches nothing*\n"


def test_two_sources_of_one_name(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "handler.py").write_text("other = 1\n")
    assert run("--handler", "handler.py", "--extra-files", "bge-large-zh") == 0
    assert "handler.py comes from both handler.py and bge-large-zh/handler.py" in capfd.readouterr().err
    with zipfile.ZipFile(work / "m.mar") as archive:
        assert archive.read("handler.py") == (work / "bge-large-zh" / "handler.py").read_bytes()


def test_links_are_followed_and_loops_refused(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = work / "bge-large-zh"
    (model / "shared").symlink_to(work / "bge-large-zh" / "1_Pooling")
    (model / "linked.txt").symlink_to(work / "requirements.txt")
    assert archiver.main(BGE) == 0
    assert {"shared/config.json", "linked.txt"} <= names(work / "bge_large_zh.mar")
    (model / "1_Pooling" / "up").symlink_to(model)
    assert archiver.main(BGE) == 1
    assert "is a symbolic link to a directory that it lies in: remove the link." in capfd.readouterr().err
    (model / "1_Pooling" / "up").unlink()
    (model / "dangling").symlink_to("nowhere")
    assert archiver.main(BGE) == 1
    assert "dangling (a symbolic link to nothing)" in capfd.readouterr().err


def test_archive_does_not_pack_itself(work: Path) -> None:
    arguments = ["--handler", "base_handler", "--extra-files", ".", "-f"]
    assert run(*arguments) == 0
    first = names(work / "m.mar")
    assert run(*arguments) == 0
    assert names(work / "m.mar") == first
    assert "m.mar" not in first


def test_no_archive_replaces_only_its_own_output(work: Path) -> None:
    options = ["--handler", "base_handler", "--archive-format", "no-archive", "-f"]
    assert run(*options, "--extra-files", "model.py") == 0
    assert run(*options, "--extra-files", "requirements.txt") == 0
    assert {path.name for path in (work / "m").iterdir()} == {"requirements.txt", "MAR-INF"}
    (work / "m" / "MAR-INF" / "MANIFEST.json").unlink()
    (work / "m" / "precious.txt").write_text("kept")
    assert run(*options, "--extra-files", "model.py") == 0
    assert {path.name for path in (work / "m").iterdir()} == {
        "requirements.txt",
        "MAR-INF",
        "precious.txt",
        "model.py",
    }


def test_no_archive_onto_its_own_source_keeps_it(work: Path) -> None:
    (work / "bge-large-zh").rename(work / "m")
    arguments = ["--handler", "m/handler.py", "--extra-files", "m/", "--archive-format", "no-archive", "-f"]
    for _ in range(2):
        assert run(*arguments) == 0
        assert (work / "m" / ".git" / "HEAD").read_text() == "ref"
        assert (work / "m" / "MAR-INF" / "MANIFEST.json").is_file()


def test_failure_while_writing_leaves_the_old_archive(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "m.mar").write_text("old")

    def broken(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_writer, "_copy", broken)
    with pytest.raises(ArchiverError, match=r'Failed to save the model-archive to model-path ".*No space left'):
        archiver.create_model_archive(
            archiver.ModelArchiveRequest("m", "1.0", "base_handler", extra_files="model.py", force=True)
        )
    assert (work / "m.mar").read_text() == "old"
    assert list(work.glob(".*.part")) == []


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_leaves_nothing(work: Path, stop_signal: signal.Signals) -> None:
    """The run is stopped while it packs a file."""
    script = (
        "import signal, sys, time\n"
        # A background job of a shell begins with SIGINT ignored, and leaves it so.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from wsgi_ts.archiver import pack, writer\n"
        "def slow(*arguments):\n"
        "    print('packing', flush=True)\n"
        "    time.sleep(30)\n"
        "writer._copy = slow\n"
        "sys.exit(pack.main(sys.argv[1:]))\n"
    )
    arguments = [
        "--model-name",
        "m",
        "--version",
        "1",
        "--handler",
        "base_handler",
        "--extra-files",
        "model.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(archiver.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, cwd=work, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"packing\n"
        assert len(list(work.glob(".m.mar.*.part"))) == 1
        process.send_signal(stop_signal)
        assert process.wait(60) == 128 + stop_signal
    assert list(work.glob(".*.part")) == []
    assert not (work / "m.mar").exists()


def test_archive_gets_the_modes_of_the_umask(work: Path) -> None:
    previous = os.umask(0o027)
    try:
        assert run("--handler", "base_handler") == 0
    finally:
        os.umask(previous)
    assert stat.S_IMODE((work / "m.mar").stat().st_mode) == 0o640


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("archive_format", ["default", "tgz", "no-archive"])
def test_progress_of_a_large_archive_is_shown(work: Path, monkeypatch: pytest.MonkeyPatch, archive_format: str) -> None:
    def shown(stream: io.StringIO) -> list[str]:
        contents = archive_writer.Contents(work / "m.mar", {"weights": work / "bge-large-zh" / "pytorch_model.bin"})
        archive_writer.write_archive(contents, {}, archive_format, "m", progress_to=stream)
        text = stream.getvalue()
        assert not text or text.endswith("\n")
        return text.split("\r")[1:] if stream.isatty() else text.splitlines()

    assert shown(Terminal()) == shown(io.StringIO()) == []
    monkeypatch.setattr(archive_writer, "_SHOWN_FROM_BYTES", 1)
    for stream in (Terminal(), io.StringIO()):
        first, *_, last = shown(stream)
        assert first.startswith("m.mar:   0%")
        assert last.startswith("m.mar: 100%")
        assert "7.00k/7.00k" in last
    assert "\r" not in stream.getvalue()


def test_workflow_archive(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "wf.yaml").write_text("models: {}\n")
    (work / "wf.py").write_text("def pre(data, context): ...\n")
    arguments = ["--workflow-name", "w", "--spec-file", "wf.yaml", "--handler", "wf.py"]
    assert archiver.workflow_main([*arguments, "--extra-files", "requirements.txt"]) == 0
    assert names(work / "w.war") == {"wf.yaml", "wf.py", "requirements.txt", "WAR-INF/MANIFEST.json"}
    with zipfile.ZipFile(work / "w.war") as archive:
        content = json.loads(archive.read("WAR-INF/MANIFEST.json"))
    assert list(content) == ["createdOn", "workflow", "archiverVersion"]
    assert content["workflow"] == {"workflowName": "w", "specFile": "wf.yaml", "handler": "wf.py"}
    assert archiver.workflow_main(arguments) == 1
    assert "overwrite the workflow archive output file." in capfd.readouterr().err


def test_errors_of_the_workflow_archiver_have_torchserves_texts(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "wf.yaml").write_text("models: {}\n")

    def failed(*arguments: str, name: str = "w") -> str:
        assert archiver.workflow_main(["--workflow-name", name, "--spec-file", "wf.yaml", *arguments]) == 1
        return capfd.readouterr().err

    assert failed(name="a b") == (
        "ERROR - Workflow name contains special characters.\n"
        "The allowed regular expression filter for workflow name is: ^[A-Za-z0-9][A-Za-z0-9_\\-.]*$\n"
    )
    assert failed("--export-path", "none") == (
        "ERROR - Given export-path none is not a directory. Point to a valid export-path directory.\n"
    )
    assert archiver.workflow_main(["--workflow-name", "w", "--spec-file", "wf.yaml"]) == 0
    assert capfd.readouterr() == ("", "")
    assert failed("--export-path", str(work)) == (
        f"ERROR - {work}/w.war already exists.\n"
        "Please specify --force/-f option to overwrite the workflow archive output file.\n"
        "See -h/--help for more details.\n"
    )
    assert archiver.workflow_main(["--workflow-name", "w", "--spec-file", "wf.yaml", "-f"]) == 0
    assert capfd.readouterr().err == f"WARNING - Overwriting {work}/w.war ...\n"
    assert failed("--extra-files", "none.txt", name="x") == "ERROR - File does not exist: none.txt\n"
    if os.getuid():
        (work / "closed").mkdir(mode=0o500)
        expected = 'ERROR - Failed to save the workflow-archive to workflow-path "closed". Check the file permissions'
        assert failed("--export-path", "closed").startswith(expected)


def test_help_of_the_workflow_archiver(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        archiver.workflow_main(["--help"])
    text = capfd.readouterr().out
    assert text.startswith("usage: torch-workflow-archiver [-h] --workflow-name WORKFLOW_NAME")
    for part in (
        "Torch Workflow Archiver Tool",
        "Path to .yaml file containing workflow DAG specification.",
        "--force",
    ):
        assert part in text
    with pytest.raises(SystemExit, match="2"):
        archiver.workflow_main(["--workflow-name", "w"])
