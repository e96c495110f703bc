"""Files of TorchServe's users mean here what they mean there; what cannot be meant is told, key and value."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from corpus.users.archives import ARCHIVES, HANDLER, UsersArchive, entries, tarred, zipped
from corpus.users.manifests import MANIFESTS, UsersManifest
from corpus.users.settings import (
    ENTRY,
    PROPERTIES,
    REFUSED,
    REFUSED_SNAPSHOTS,
    SNAPSHOTS,
    UNKNOWN,
    YAMLS,
    UsersProperties,
    UsersYaml,
)
from hypothesis import given
from hypothesis import strategies as st
from support.model_archives import Place

from wsgi_ts.archive.manifest import load_model_yaml
from wsgi_ts.archive.model_directory import open_archive
from wsgi_ts.handlers.serving.loader import load_entry
from wsgi_ts.models.effective_settings import effective_settings
from wsgi_ts.models.model_yaml import parse_model_yaml
from wsgi_ts.models.recorded import SnapshotError, recorded_models
from wsgi_ts.settings.config import Config, ConfigError
from wsgi_ts.settings.conversion import to_boolean, to_text, to_whole_number
from wsgi_ts.settings.lenient_json import parse_lenient
from wsgi_ts.settings.model_entries import known_runtime
from wsgi_ts.settings.sources import CommandLine, load_config

# Archives


@pytest.mark.parametrize("case", ARCHIVES, ids=lambda case: case.name)
def test_archives_of_users(tmp_path: Path, case: UsersArchive) -> None:
    place = Place(tmp_path)
    case.build(place.store / case.name)
    opened = place.open(case.name)
    found = {path.relative_to(opened.path).as_posix() for path in opened.path.rglob("*")}
    assert case.files <= found
    assert (opened.manifest.model_name, opened.manifest.model_version) == ("m", "1.0")
    assert [str(path.relative_to(place.models)) for path in place.models.glob("*")] == [
        opened.path.name
    ] * opened.extracted
    handler = opened.path / (opened.manifest.handler or "").partition(":")[0]
    if handler.parent == opened.path:
        assert handler.read_bytes() == HANDLER
    assert not stat.S_IMODE(handler.stat().st_mode) & (stat.S_ISUID | stat.S_ISGID)


def test_a_handler_finds_the_modules_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (each for each in ARCHIVES if each.name == "handler-in-a-folder.mar")
    place = Place(tmp_path)
    case.build(place.store / case.name)
    opened = place.open(case.name)
    monkeypatch.syspath_prepend(str(opened.path))
    entry = load_entry(opened.manifest.handler or "", str(opened.path))
    assert entry.handle([{"body": b"x"}], None) == [b"x"]


@pytest.mark.parametrize(
    "build", [tarred(entries()), tarred([("handler.py", HANDLER)]), zipped([("a/handler.py", HANDLER)])]
)
def test_archives_without_a_manifest_where_it_is_looked_for(tmp_path: Path, build: object) -> None:
    """TorchServe drops the first folder of a tar, MAR-INF included; a name in the call is enough then."""
    place = Place(tmp_path)
    assert callable(build)
    build(place.store / "a.tar.gz")
    manifest = place.open("a.tar.gz", model_name="given").manifest
    assert (manifest.model_name, manifest.model_version, manifest.runtime) == ("given", "1.0", "python")


# Manifests


@pytest.mark.parametrize("case", MANIFESTS, ids=lambda case: case.name)
def test_manifests_of_users(tmp_path: Path, case: UsersManifest) -> None:
    model = tmp_path / "model"
    (model / "MAR-INF").mkdir(parents=True)
    (model / "MAR-INF" / "MANIFEST.json").write_text(case.text, newline="")
    for name in ("h.py", "model.pt", "config.yaml"):
        (model / name).touch()
    manifest = open_archive("model", tmp_path, tmp_path / "models").manifest
    assert manifest.model_name == "m"
    assert (manifest.model_version, manifest.handler, manifest.runtime) == (case.version, case.handler, case.runtime)
    of_key = {
        "serializedFile": manifest.serialized_file,
        "modelFile": manifest.model_file,
        "configFile": manifest.config_file,
    }
    for key, file in case.files:
        # What handlers read of the manifest is the same.
        assert of_key[key] == file == manifest.raw["model"][key]


def test_runtimes_in_any_case() -> None:
    assert [known_runtime(text) for text in ("PYTHON", "Python3", "lsp", "ruby", None)] == [
        "python",
        "python3",
        "LSP",
        "ruby",
        None,
    ]


# config.properties


def load(data: str | bytes) -> Config:
    Path("config.properties").write_bytes(data.encode() if isinstance(data, str) else data)
    return load_config(CommandLine(model_store="store"), {})


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a model store that has `m.mar` and a folder `m`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "m.mar").touch()
    (tmp_path / "store" / "m").mkdir()
    return tmp_path


@pytest.mark.parametrize("case", PROPERTIES, ids=lambda case: case.name)
def test_properties_of_users(directory: Path, case: UsersProperties) -> None:
    config = load(case.data)
    assert config.model_defaults("m", "1.0") == (case.entry or {})
    assert {key: getattr(config, key) for key, _ in case.settings} == dict(case.settings)
    # The processes of the instance read it from JSON.
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_values_that_cannot_be_meant(directory: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(line)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.properties:1: key model")


@pytest.mark.parametrize(("line", "message"), UNKNOWN)
def test_settings_of_models_that_nobody_reads(directory: Path, line: str, message: str) -> None:
    where = "config.properties:1: key models: model 'm', version '1.0': "
    assert any(warning == where + message for warning in load(line).warnings)


def test_settings_of_another_version_are_told() -> None:
    """An archive of version 1 does not get what is said of version 1.0."""
    config = Config(models={"m": {"1.0": {"batchSize": 4}}})
    chosen = [effective_settings(config, None, None, "m", version, cores=1) for version in ("1.0", "1")]
    assert [each.batch_size for each in chosen] == [4, 1]
    warning = "The key models says nothing of version 1; its versions of this model: 1.0"
    assert [each.warnings for each in chosen] == [(), (warning,)]
    assert effective_settings(config, None, None, "other", "1", cores=1).warnings == ()


# Snapshots


@pytest.mark.parametrize(("text", "differs"), [case[1:] for case in SNAPSHOTS], ids=[case[0] for case in SNAPSHOTS])
def test_snapshots_of_users(directory: Path, text: str, differs: dict[str, object]) -> None:
    (found,) = recorded_models(load(text))
    entry = found.to_json()
    expected = {**ENTRY, "defaultVersion": True, "marName": "m.mar", **differs}
    assert (found.name, found.version) == ("m", "1.0")
    assert {key: entry.get(key) for key in expected} == expected


@pytest.mark.parametrize(("text", "message"), REFUSED_SNAPSHOTS)
def test_snapshots_that_cannot_be_meant(directory: Path, text: str, message: str) -> None:
    with pytest.raises(SnapshotError) as caught:
        recorded_models(load(text))
    assert str(caught.value).endswith(f"config.properties: model_snapshot: {message}")


# model-config.yaml


@pytest.mark.parametrize("case", YAMLS, ids=lambda case: case.name)
def test_yaml_of_users(tmp_path: Path, case: UsersYaml) -> None:
    path = tmp_path / "model-config.yaml"
    path.write_text(case.text, encoding="utf-8", newline="")
    found = parse_model_yaml(load_model_yaml(path))
    assert {name: getattr(found, name) for name, _ in case.fields} == dict(case.fields)
    assert found.warnings == case.warnings


# The readers themselves


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-0.5e1", -5.0),
        (" 'it\\'s' ", "it's"),
        ('"a\\u00e9\\n\\/"', "aé\n/"),
        ("[1, two; 'three' , NULL]", [1, "two", "three", None]),
        ("{a: {b: [TRUE, false,],},}", {"a": {"b": [True, False]}}),
        ("{a=1;b=>2} // end", {"a": 1, "b": 2}),
        ("{a: 1, a: 2}", {"a": 2}),
        ("010", "010"),
        ("NaN", "NaN"),
        ("{}", {}),
    ],
)
def test_lenient_json(text: str, value: object) -> None:
    assert parse_lenient(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1",
        "{a}",
        "{a:}",
        "[,]",
        "[1,,2]",
        "{} {}",
        "'a",
        '"\\x"',
        '"\\ud83d"',
        "/* open",
        "{a: 1 b: 2}",
        "[" * 5000,
    ],
)
def test_what_is_no_json_even_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"near|at the end"):
        parse_lenient(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_every_json_is_lenient_json(value: object) -> None:
    assert parse_lenient(json.dumps(value)) == value
    assert parse_lenient(json.dumps(value, ensure_ascii=False, indent=1)) == value


def test_conversions() -> None:
    assert [to_whole_number(value) for value in (3, 3.0, "3", " +3 ", "3.0", "-3.")] == [3, 3, 3, 3, 3, -3]
    for wrong in (True, None, 2.5, "2.5", "", "x", "0x3", "٣", [3], float("nan"), float("inf"), 1e30, "9" * 30):
        with pytest.raises(ValueError, match="is not a whole number"):
            to_whole_number(wrong)
    assert [to_boolean(value) for value in (True, "TRUE", " false ", False)] == [True, True, False, False]
    for wrong in (1, 0, None, "yes", "", [True]):
        with pytest.raises(ValueError, match="is neither true nor false"):
            to_boolean(wrong)
    assert [to_text(value) for value in ("a", 1, True, parse_lenient("1.10"))] == ["a", "1", "true", "1.10"]
    for wrong in (None, [], {}):
        with pytest.raises(ValueError, match="is not a text"):
            to_text(wrong)
