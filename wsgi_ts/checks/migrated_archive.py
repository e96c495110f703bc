"""An archive made for TorchServe: what will be otherwise with its model here. Nothing of it is run."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from wsgi_ts.archive.manifest import Manifest, load_model_yaml
from wsgi_ts.archive.model_directory import open_archive
from wsgi_ts.checks.difference import Difference, Level
from wsgi_ts.checks.handler_source import check_handler
from wsgi_ts.checks.migrated_properties import jar_difference
from wsgi_ts.errors import ServerError
from wsgi_ts.models.model_yaml import ModelYaml, check_parallel, parse_model_yaml
from wsgi_ts.settings.stores import archive_stem
from wsgi_ts.ts_path import shim_path

_ENVELOPES = frozenset(("body", "json", "kserve", "kservev2"))
#: Bundled handlers that differ from TorchServe's.
_BUNDLED: Mapping[str, tuple[Level, str, str]] = {
    "densenet_handler": ("WARN", "takes images only: it does not unpickle requests", "send images"),
    "text_classifier": (
        "NOTE",
        "answers each text of a batch by itself, and reads a vocabulary as plain data, JSON or text",
        "",
    ),
}
_PICKLED = "weights are loaded with weights_only=True: a pickled module is refused"
_HOW_TO_PACK = "store a state_dict with --model-file, or set weightsOnly: false in its model-config.yaml"


def check_archive(path: Path) -> Iterator[Difference]:
    """All that will differ with a model archive, or a model's folder."""
    shown = str(path)
    with tempfile.TemporaryDirectory(prefix="wsgi-ts-migrate-") as place:
        try:
            model = open_archive(
                shown, path.parent, Path(place), model_name=archive_stem(path.name), any_directory=True
            )
        except ServerError as error:
            told = f"is not accepted: {error.message}"
            yield Difference("FAIL", shown, told, "pack it again with torch-model-archiver")
            return
        yield from _check_manifest(shown, model.manifest)
        yield from _check_files(shown, model.path)
        yaml = None
        if model.manifest.config_file:
            found = list(_check_yaml(shown, model.path, model.manifest.config_file))
            yaml = next((each for each in found if isinstance(each, ModelYaml)), None)
            yield from (each for each in found if isinstance(each, Difference))
        yield from _check_weights(shown, model.path, model.manifest, yaml)
        yield from _check_handler(shown, model.path, model.manifest)


def _check_manifest(shown: str, manifest: Manifest) -> Iterator[Difference]:
    where = f"{shown}!MAR-INF/MANIFEST.json"
    if not manifest.raw:
        told = "is not there: name and version are taken from the file"
        yield Difference("WARN", where, told, "pack the model with torch-model-archiver")
    if manifest.runtime == "LSP":
        told = "runtime LSP is the C++ backend, which this server does not have"
        yield Difference("FAIL", where, told, "serve the model with a handler in Python")
    envelope = manifest.raw.get("model", {}).get("envelope") if manifest.raw else None
    if envelope and envelope not in _ENVELOPES:
        told = f"envelope {envelope!r} is unknown; there are {', '.join(sorted(_ENVELOPES))}"
        yield Difference("FAIL", where, told, "its workers would not start: name one of them")
    if manifest.requirements_file:
        told = f"{manifest.requirements_file} is installed only with install_py_dep_per_model=true, as in TorchServe"
        advice = "set it, or install the packages where the server runs"
        yield Difference("NOTE", where, told, advice)


def _check_files(shown: str, folder: Path) -> Iterator[Difference]:
    for jar in sorted(folder.rglob("*.jar")):
        yield jar_difference(jar.relative_to(folder), shown)
    for library in sorted(folder.rglob("*.so")):
        if "cpython" not in library.name:
            told = "is a shared library; as a handler of the C++ backend it cannot be used"
            advice = "nothing, where the Python handler loads it"
            yield Difference("NOTE", f"{shown}!{library.relative_to(folder)}", told, advice)


def _check_yaml(shown: str, folder: Path, name: str) -> Iterator[Difference | ModelYaml]:
    where = f"{shown}!{name}"
    try:
        fields = load_model_yaml(folder / name)
        yaml = parse_model_yaml(fields)
        check_parallel(yaml)
    except ServerError as error:
        text = error.message.replace(f"{folder}/", f"{shown}!")
        yield Difference("FAIL", where, text, "the model is not registered: correct the file and pack it again")
        return
    for warning in yaml.warnings:
        yield Difference("WARN", shown, warning.replace(f"{folder}/", ""), "correct the file and pack it again")
    if yaml.batch_size > 1 and yaml.max_batch_delay_ms and yaml.batch_policy is None:
        line = yaml.raw.place("maxBatchDelay").rpartition("/")[2]
        told = f"maxBatchDelay {yaml.max_batch_delay_ms} is a limit here, and no wait"
        yield Difference("NOTE", f"{shown}!{line}", told, "batchPolicy: fixed waits as before")
    yield yaml


def _check_weights(shown: str, folder: Path, manifest: Manifest, yaml: ModelYaml | None) -> Iterator[Difference]:
    if manifest.model_file or not manifest.serialized_file or (yaml is not None and yaml.weights_only is False):
        return
    for name in manifest.serialized_file.split(","):
        file = folder / name.strip()
        if file.suffix not in (".pt", ".pth", ".bin") or not zipfile.is_zipfile(file):
            continue
        with zipfile.ZipFile(file) as content:
            entries = content.namelist()
        # TorchScript has the code of its module beside the weights; what has none is a pickle.
        if any(entry.endswith("/data.pkl") for entry in entries) and not any("/code/" in entry for entry in entries):
            yield Difference("WARN", f"{shown}!{name.strip()}", _PICKLED, _HOW_TO_PACK)


def _check_handler(shown: str, folder: Path, manifest: Manifest) -> Iterator[Difference]:
    handler = manifest.handler
    where = f"{shown}!MAR-INF/MANIFEST.json"
    if not handler:
        told = "names no handler: default_service_handler of config.properties counts"
        yield Difference("WARN", where, told, "set that key, or pack the archive with --handler")
        return
    file = folder / handler.partition(":")[0]
    source = file.with_name(f"{file.name.removesuffix('.py')}.py")
    if not source.is_file():
        name = handler.partition(":")[0].removesuffix(".py")
        if not Path(shim_path(), "ts", "torch_handler", f"{name}.py").is_file():
            told = f"names the handler {handler}, which is neither in the archive nor one of the bundled ones"
            yield Difference("FAIL", where, told, "its workers would not start: pack it with --handler")
        elif name in _BUNDLED:
            level, text, advice = _BUNDLED[name]
            yield Difference(level, where, f"{name} {text}", advice)
        return
    yield from check_handler(source, folder, shown, _requirements(folder, manifest))


def _requirements(folder: Path, manifest: Manifest) -> list[str]:
    lines: list[str] = []
    for name in (manifest.requirements_file or "").split(","):
        file = folder / name.strip()
        if name.strip() and file.is_file():
            lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines
