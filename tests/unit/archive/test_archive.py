"""Where archives are found, and what their manifests and settings may say."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from support.model_archives import HANDLER, MANIFEST, MANIFEST_MEMBER, Place, mar, with_model, write_tar

from wsgi_ts.archive.manifest import check_name, load_model_yaml, parse_manifest, resolve_handler
from wsgi_ts.archive.model_directory import open_archive, remove_model_directory
from wsgi_ts.errors import (
    BadRequest,
    ModelNotFound,
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A fresh place."""
    return Place(tmp_path)


# --- where archives are found ------------------------------------------------------------------------------


def test_mar_from_the_store(place: Place) -> None:
    mar(place.store / "probe.mar", {"probe_handler.py": HANDLER, "data/vocab.txt": b"a"})
    opened = place.open("probe.mar")
    assert opened.extracted and opened.downloaded is None and opened.url == "probe.mar"
    assert opened.path.parent == place.models and len(opened.path.name) == 32
    assert stat.S_IMODE(opened.path.stat().st_mode) == 0o700
    assert (opened.path / "probe_handler.py").read_bytes() == HANDLER
    assert stat.S_IMODE((opened.path / "probe_handler.py").stat().st_mode) == 0o600
    assert (opened.path / "data" / "vocab.txt").read_bytes() == b"a"
    manifest = opened.manifest
    assert (manifest.model_name, manifest.model_version) == ("probe", "1.0")
    assert (manifest.handler, manifest.runtime) == ("probe_handler.py", "python")
    assert manifest.raw == MANIFEST
    remove_model_directory(opened)
    remove_model_directory(opened)
    assert not opened.path.exists()
    assert (place.store / "probe.mar").exists()


def test_absolute_path_means_its_last_part_in_the_store(place: Place) -> None:
    mar(place.store / "mnist.mar")
    assert place.open("/home/model-server/model-store/mnist.mar").manifest.model_name == "probe"


def test_tar_gz_drops_the_first_component(place: Place) -> None:
    write_tar(place.store / "tgz.tar.gz", [("tgz/h.py", HANDLER), ("tgz/sub/x", b"1"), MANIFEST_MEMBER])
    opened = place.open("tgz.tar.gz")
    assert (opened.path / "h.py").read_bytes() == HANDLER
    assert (opened.path / "sub" / "x").read_bytes() == b"1"
    assert opened.manifest.model_name == "probe"


def test_directories_are_used_in_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model = place.store / "noarc"
    (model / "MAR-INF").mkdir(parents=True)
    (model / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(MANIFEST))
    for url in ("noarc", "noarc/", str(model)):
        opened = place.open(url)
        assert (opened.path, opened.extracted) == (model, False)
    remove_model_directory(opened)
    assert model.is_dir()
    nested = place.root / "elsewhere" / "only"
    nested.parent.mkdir()
    model.rename(nested)
    # Outside of the store: where the operator says so, and not over the API.
    monkeypatch.chdir(place.root)
    for url in (str(nested.parent), "elsewhere"):
        assert place.open(url, any_directory=True).path == nested
    assert place.refuse("elsewhere", ModelNotFound) == "Model not found at: elsewhere"
    # A link in the store is the operator's word too; a way around through the store is not.
    (place.store / "linked").symlink_to(nested)
    assert place.open("linked").path == nested
    (place.store / "way").symlink_to(place.root)
    assert place.refuse("store/way/elsewhere", ModelNotFound) == "Model not found at: store/way/elsewhere"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty url"),
        ("nothere.mar", "Model not found at: nothere.mar"),
        ("../../etc/passwd", "Relative path is not allowed in url: ../../etc/passwd"),
        ("http://h/a/../b.mar", "Relative path is not allowed in url: http://h/a/../b.mar"),
        ("ftp://h/b.mar", "Model not found at: ftp://h/b.mar"),
        ("s3://bucket/b.mar", "Model not found at: s3://bucket/b.mar"),
        ("file:/b.mar", "Model not found at: file:/b.mar"),
        ("ftp://h/a?x=../b.mar", "Relative path is not allowed in url: ftp://h/a?x=../b.mar"),
        ("jar:file:///b.mar!", "Model not found at: jar:file:///b.mar!"),
        ("/", "Model not found at: /"),
        (".", "Model not found at: ."),
        ("a\0b.mar", "Model not found at: a\0b.mar"),
        ("x" * 5000, "Model not found at: " + "x" * 5000),
    ],
)
def test_not_found(place: Place, url: str, message: str) -> None:
    assert place.refuse(url, ModelNotFound) == message


def test_no_model_store(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"Model store has not been configured\."):
        open_archive("a.mar", None, tmp_path)


# --- the manifest ------------------------------------------------------------------------------------------


def test_missing_manifest(place: Place) -> None:
    mar(place.store / "nomanifest.mar", {"a.py": b"x=1"}, None)
    assert place.refuse("nomanifest.mar") == "Model name is not defined."
    manifest = place.open("nomanifest.mar", model_name="given").manifest
    assert (manifest.model_name, manifest.model_version, manifest.runtime) == ("given", "1.0", "python")
    assert manifest.raw == {} and manifest.handler is None


def test_given_name_replaces_the_manifests(place: Place) -> None:
    mar(place.store / "a.mar")
    manifest = place.open("a.mar", model_name="other").manifest
    assert manifest.model_name == "other"
    assert manifest.raw["model"]["modelName"] == "probe"
    assert "Model name is not allowed" in place.refuse("a.mar", BadRequest, model_name="a/b")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"runtime": "python"}, "Model name is not defined."),
        ({"runtime": "python", "model": None}, "Missing Model entry in manifest file."),
        ({"model": {"modelVersion": "1"}}, "Model name is not defined."),
        (with_model(modelName=""), "Model name is not defined."),
        ({**MANIFEST, "runtime": "ruby"}, "Runtime is not defined or invalid."),
        ({**MANIFEST, "runtime": None}, "Runtime is not defined or invalid."),
        ({**MANIFEST, "model": []}, "Failed to parse signature.json."),
        (with_model(handler=["x"]), "Failed to parse signature.json."),
        (with_model(modelVersion={}), "Failed to parse signature.json."),
        (with_model(modelName="../.."), "Model name is not allowed: ../.."),
        (with_model(modelVersion="../1"), "Model version is not allowed: ../1"),
        (with_model(modelName="a\nb"), "Model name is not allowed: a\\nb"),
        (with_model(modelName="x" * 300), "Model name is not allowed: xxx"),
        (with_model(handler="../../x.py"), "Manifest entry handler leaves the model directory: ../../x.py"),
        (with_model(handler="/etc/x.py"), "Manifest entry handler leaves the model directory: /etc/x.py"),
        (with_model(handler="os:system"), "Handler is not allowed: os:system"),
        (with_model(handler="x/os.py:system"), "Handler is not allowed: x/os.py:system"),
        (with_model(serializedFile="../w.pt"), "Manifest entry serializedFile leaves the model directory"),
        (with_model(configFile="/etc/passwd"), "Manifest entry configFile leaves the model directory"),
        (with_model(requirementsFile="a\\..\\b"), "Manifest entry requirementsFile leaves the model"),
    ],
)
def test_manifest_faults(place: Place, manifest: dict[str, Any], message: str) -> None:
    mar(place.store / "a.mar", manifest=manifest)
    assert place.refuse("a.mar").startswith(message)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[1]",
        b"\xff\xfe",
        b'{"a":' * 200_000,
        b'{"model": ' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"n": ' + b"9" * 5000 + b"}",
        b" " * (2 << 20) + b"{}",
    ],
)
def test_unparsable_manifests(place: Place, content: bytes) -> None:
    mar(place.store / "a.mar", {"MAR-INF/MANIFEST.json": content}, None)
    assert place.refuse("a.mar") == "Failed to parse signature.json."


def test_manifest_that_is_a_directory_or_a_fifo(place: Place) -> None:
    mar(place.store / "a.mar", {"MAR-INF/MANIFEST.json/x": b"{}"}, None)
    assert place.refuse("a.mar") == "Failed to parse signature.json."
    (place.store / "d" / "MAR-INF").mkdir(parents=True)
    (place.store / "d" / "x").touch()
    os.mkfifo(place.store / "d" / "MAR-INF" / "MANIFEST.json")
    assert place.refuse("d") == "Failed to parse signature.json."


def test_links_of_a_directory_model_are_the_operators(place: Place) -> None:
    model = place.store / "d"
    (model / "MAR-INF").mkdir(parents=True)
    (model / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(with_model(serializedFile="w.pt")))
    (place.root / "weights.pt").write_bytes(b"w")
    (model / "w.pt").symlink_to(place.root / "weights.pt")
    assert place.open("d").manifest.serialized_file == "w.pt"


def test_numbers_count_as_text() -> None:
    manifest = parse_manifest(with_model(modelVersion=2.0))
    assert manifest.model_version == "2.0"


def test_handlers_that_pass(tmp_path: Path) -> None:
    for handler in ("nosuch", "image_classifier", "h.py:entry", "sub/h.py", "my_package.module:f"):
        resolve_handler(handler, tmp_path)
    (tmp_path / "code.py").touch()
    resolve_handler("code.py", tmp_path)
    beyond = f"sub/{'y' * 300}"
    assert resolve_handler(beyond, tmp_path) == beyond, "no file can be called so, as its worker will say"


def test_names_that_pass() -> None:
    for name in ("a", "a b", "名", "wf__node", "1.0", "v%2e"):
        check_name("Model name", name)


# --- model-config.yaml -------------------------------------------------------------------------------------


def test_model_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("minWorkers: 1\nbase: &b {x: 1}\nhandler: {<<: *b, profile: true}\n")
    expected = {"minWorkers": 1, "base": {"x": 1}, "handler": {"x": 1, "profile": True}}
    assert load_model_yaml(path) == expected
    path.write_text("")
    assert load_model_yaml(path) == {}


BILLION_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    "content",
    [
        b"a: [1",
        b"- 1",
        b"text",
        b"a: !!python/object/apply:os.system ['touch /tmp/x']",
        b"a: &a [*a]",
        b"a: 1\n---\nb: 2",
        b"? [1]\n: 2",
        b"\xff\xfe\xfd",
        b"[" * 5000,
        BILLION_LAUGHS.encode(),
        b"# " + b"x" * (2 << 20),
        b"d: 2026-99-99",
    ],
)
def test_model_yaml_that_cannot_be_used(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert load_model_yaml(path) == {}
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert caplog.records[0].getMessage().startswith(f"Failed to parse model config file {path}")


def test_missing_model_yaml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_model_yaml(tmp_path / "c.yaml") == {}
    assert "Failed to parse model config file" in caplog.text
