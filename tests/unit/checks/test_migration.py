"""`wsgi-ts doctor --migrate`: files of a TorchServe, and what is told of each."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from corpus.users.archives import ARCHIVES, UsersArchive
from corpus.users.settings import PROPERTIES, UsersProperties
from support.archives import archive
from support.server import REPOSITORY

from wsgi_ts.checks.difference import Difference
from wsgi_ts.checks.migration import NothingThere, check_migration, machine_notes
from wsgi_ts.cli.commands import wsgi_ts

GOLDEN = REPOSITORY / "tests" / "golden" / "store"
#: A line of config.properties, and of what is told of it the level, a part, and a part of the advice.
LINES = [
    ("management_adress=http://127.0.0.1:8081", "WARN", "did you mean management_address?", "correct it"),
    ("job_queue_size=many", "FAIL", "'many' is not a whole number", "correct the value"),
    ("inference_address=https:/127.0.0.1", "FAIL", "https:/127.0.0.1", "correct the value"),
    ("enable_model_api=1", "WARN", "taken for false", "write what is meant"),
    ("model_store=$$NOT_SET_ANYWHERE$$", "FAIL", "NOT_SET_ANYWHERE", "set the variable"),
    ("number_of_netty_threads=8", "NOTE", "number of web workers", "web_workers"),
    ("netty_client_threads=8", "WARN", "has no effect here", "remove the line"),
    ("vmargs=-Xmx4g", "WARN", "no Java machine", "remove the line"),
    ("vmargs=-Dlog4j.configurationFile=/not/there.xml", "FAIL", "/not/there.xml is not there", "correct the path"),
    ("cpu_launcher_enable=true", "WARN", "has no effect", "threadsPerWorker"),
    ("inference_address=http://0.0.0.0:8080", "WARN", "need a token", "key_file.json"),
    ("metrics_mode=legacy", "NOTE", "deprecated", "metrics_mode=prometheus"),
    ("metrics_config=/not/there.yaml", "WARN", "no file /not/there.yaml", "correct the path"),
    ('models={"m": {"1.0": {"minWorker": 2}}}', "WARN", "did you mean minWorkers?", "correct it"),
    ('models={"m": {"1.0": {"batchSize": 8, "maxBatchDelay": 50}}}', "NOTE", "no wait (m 1.0)", "batch_policy=fixed"),
    ('model_snapshot={"models": {"m": {"1.0": {}}}}', "FAIL", "no marName", "--ncs"),
]


def told(path: Path) -> list[Difference]:
    return list(check_migration(path, {}))


def properties(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "config.properties"
    path.write_text("\n".join(("# one", *lines, "enable_model_api=false", "")))
    return path


@pytest.mark.parametrize(("line", "level", "text", "advice"), LINES)
def test_a_line_is_told_with_its_number_and_what_to_do(
    tmp_path: Path, line: str, level: str, text: str, advice: str
) -> None:
    path = properties(tmp_path, line)
    key = line.partition("=")[0]
    [found] = [each for each in told(path) if each.where.startswith(f"{path}:2: {key}") and text in each.text]
    assert (found.level, advice in found.advice) == (level, True)


def test_a_file_without_differences_has_none(tmp_path: Path) -> None:
    lines = ("inference_address=http://127.0.0.1:8080", "default_workers_per_model=2", "load_models=all")
    assert told(properties(tmp_path, *lines)) == []


def test_lines_come_in_their_order_and_a_key_that_is_given_twice_is_named(tmp_path: Path) -> None:
    path = properties(tmp_path, "vmargs=-Xmx4g", "nonsense=1", "io_ratio=7", "io_ratio=8")
    found = told(path)
    numbers = [int(each.where.split(":")[1]) for each in found]
    assert numbers == sorted(numbers)
    assert any("is given again" in each.text and f"{path}:4" in each.text for each in found)


def test_certificates_count_where_tls_is_served(tmp_path: Path) -> None:
    store = tmp_path / "old.jks"
    store.write_bytes(b"\xfe\xed\xfe\xed more")
    lines = [f"keystore={store}", "keystore_pass=changeit"]
    assert told(properties(tmp_path, *lines)) == []
    [found] = told(properties(tmp_path, "inference_address=https://127.0.0.1:8443", *lines))
    assert found.level == "FAIL"
    assert "keytool -importkeystore" in found.advice
    found = told(properties(tmp_path, "inference_address=https://127.0.0.1:8443", f"private_key_file={store}"))
    assert [each.level for each in found] == ["FAIL"]
    assert "without certificate_file" in found[0].text


def test_jars_and_log_configurations_are_found_through_the_file(tmp_path: Path) -> None:
    (tmp_path / "plugin.jar").touch()
    logs = tmp_path / "log4j2.xml"
    logs.write_text(
        "<Configuration><Appenders>\n<Kafka name='k' topic='t'/>\n</Appenders><Loggers><Root level='info'/></Loggers>"
        "</Configuration>"
    )
    lines = (f"plugins_path={tmp_path}", f"vmargs=-Dlog4j.configurationFile=file://{logs}")
    found = told(properties(tmp_path, *lines))
    assert any("plugin.jar" in each.where and "docs/plugins.md" in each.advice for each in found)
    assert any(each.where.startswith(f"{logs}:2") and each.level == "WARN" for each in found)


@pytest.mark.parametrize("users", PROPERTIES, ids=lambda each: each.name)
def test_users_files_are_read(users: UsersProperties, tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_bytes(users.data if isinstance(users.data, bytes) else users.data.encode())
    assert all(each.level != "FAIL" for each in told(path))


@pytest.mark.parametrize("users", ARCHIVES, ids=lambda each: each.name)
def test_users_archives_are_read(users: UsersArchive, tmp_path: Path) -> None:
    path = tmp_path / users.name
    users.build(path)
    before = sorted(tmp_path.rglob("*"))
    assert all(each.level != "FAIL" for each in told(path))
    assert sorted(tmp_path.rglob("*")) == before


def model(tmp_path: Path, source: str, **more: object) -> list[Difference]:
    return told(archive(tmp_path, "m", source, **more))  # type: ignore[arg-type]


HANDLE = "\ndef handle(data, context):\n    return data\n"


def test_imports_that_are_not_there_are_named_with_their_line(tmp_path: Path) -> None:
    source = """\
        import os, numpy
        import nowhere.at_all
        from ts.torch_handler.base_handler import BaseHandler
        from ts.torch_handler.base_handler import OtherHandler
        from ts.metrics.collectors import gather
        import ts.nothing
        from helper import help
        try:
            import faster
        except ImportError:
            faster = None
        def handle(data, context):
            import later
            return data
    """
    found = model(tmp_path, source, files={"helper.py": "import os\nimport unheard_of\ndef help(): pass\n"})
    shown = {(each.where.rpartition("!")[2], each.level): each for each in found}
    assert set(shown) == {
        ("handler.py:2", "FAIL"),
        ("handler.py:4", "FAIL"),
        ("handler.py:5", "FAIL"),
        ("handler.py:6", "FAIL"),
        ("handler.py:9", "WARN"),
        ("handler.py:13", "WARN"),
        ("helper.py:2", "FAIL"),
    }
    assert "imports nowhere" in shown["handler.py:2", "FAIL"].text
    assert "imports OtherHandler from ts.torch_handler.base_handler" in shown["handler.py:4", "FAIL"].text
    assert "pip install unheard_of" in shown["helper.py:2", "FAIL"].advice


def test_what_is_in_the_requirements_is_not_missing(tmp_path: Path) -> None:
    overrides = {"requirementsFile": "requirements.txt"}
    files = {"requirements.txt": "scikit_absent>=1\nOPENCV-python-absent\n"}
    found = model(tmp_path, f"import scikit_absent{HANDLE}", files=files, manifest_overrides=overrides)
    [note] = found
    assert note.level == "NOTE"
    assert "install_py_dep_per_model" in note.text


def test_a_handler_of_another_python_is_told_with_its_line(tmp_path: Path) -> None:
    [found] = model(tmp_path, f"import os\nprint 'two'{HANDLE}")
    assert (found.level, found.where.endswith("!handler.py:2")) == ("FAIL", True)


def test_manifests_and_configurations(tmp_path: Path) -> None:
    found = model(tmp_path, HANDLE, config_yaml="batchSize: 8\nmaxBatchDelay: 20\nresponseTimeout: soon\n")
    assert {(each.level, each.where.rpartition("!")[2]) for each in found} >= {("NOTE", "model-config.yaml:2")}
    assert any(each.level == "WARN" and "responseTimeout" in each.text for each in found)
    [found_one] = model(tmp_path, HANDLE, manifest_overrides={"handler": "not_there"})
    assert (found_one.level, "--handler" in found_one.advice) == ("FAIL", True)
    assert model(tmp_path, HANDLE, manifest_overrides={"handler": "image_classifier"}) == []
    [found_one] = model(tmp_path, HANDLE, manifest_overrides={"envelope": "unheard"})
    assert found_one.level == "FAIL"


def test_weights_that_are_a_pickled_module(tmp_path: Path) -> None:
    def weights(*names: str) -> bytes:
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as content:
            for name in names:
                content.writestr(name, b"")
        return memory.getvalue()

    overrides = {"handler": "image_classifier", "serializedFile": "w.pt"}
    pickled, script = weights("w/data.pkl"), weights("w/data.pkl", "w/code/a.py")
    [found] = model(tmp_path, HANDLE, files={"w.pt": pickled}, manifest_overrides=overrides)
    assert (found.level, "weightsOnly" in found.advice) == ("WARN", True)
    assert model(tmp_path, HANDLE, files={"w.pt": script}, manifest_overrides=overrides) == []


def test_a_whole_model_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert wsgi_ts(["doctor", "--migrate", str(GOLDEN)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rpartition("/")[2] for line in lines if line.startswith("FAIL  ")] == ["notzip.mar:"]
    assert lines[-1].startswith("FAIL 1, WARN ")
    assert any(line.startswith("NOTE  this machine: ") for line in lines)


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = properties(tmp_path, "netty_client_threads=8")
    assert wsgi_ts(["doctor", "--migrate", str(path)]) == 0
    assert wsgi_ts(["doctor", "--migrate", str(path), "--strict"]) == 1
    capsys.readouterr()
    assert wsgi_ts(["doctor", "--migrate", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "level": "WARN",
        "where": f"{path}:2: netty_client_threads",
        "text": "has no effect here (threads towards the backend)",
        "advice": "remove the line",
    }
    assert rows[-1]["where"] == "this machine"
    assert wsgi_ts(["doctor", "--migrate", str(tmp_path / "nothing")]) == 2
    binary = tmp_path / "binary"
    binary.write_bytes(b"\0\1")
    with pytest.raises(NothingThere, match="is none of"):
        told(binary)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NothingThere, match="holds no archive"):
        told(empty)


def test_the_machine_is_told_with_what_follows() -> None:
    [note] = machine_notes()
    assert "cores" in note.text
    assert "default_workers_per_model" in note.advice
