"""MANIFEST.json of old packers and of text editors: what TorchServe takes them for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UsersManifest:
    """One manifest of an archive that holds `h.py`, `model.pt` and `config.yaml`.

    Attributes:
        name: says what is special.
        text: the file.
        version: the version it is registered with.
        handler: the handler that is loaded.
        runtime: the runtime it is registered with.
        files: what the manifest's other keys have to name.
    """

    name: str
    text: str
    version: str = "1.0"
    handler: str | None = "h.py"
    runtime: str = "python"
    files: tuple[tuple[str, str], ...] = ()


def _model(model: str, rest: str = '"runtime": "python"') -> str:
    return f'{{{rest}, "model": {{"modelName": "m", "handler": "h.py", {model}}}}}'


MANIFESTS = [
    UsersManifest("no version", '{"runtime": "python", "model": {"modelName": "m", "handler": "h.py"}}'),
    UsersManifest("empty version", _model('"modelVersion": ""')),
    UsersManifest("version is null", _model('"modelVersion": null')),
    UsersManifest("version is a number", _model('"modelVersion": 2'), version="2"),
    UsersManifest("version 1.0 is a number", _model('"modelVersion": 1.0')),
    UsersManifest("version 1.10 is a number", _model('"modelVersion": 1.10'), version="1.10"),
    UsersManifest("version with a word", _model('"modelVersion": "v2-rc"'), version="v2-rc"),
    UsersManifest("no runtime", '{"model": {"modelName": "m", "handler": "h.py"}}'),
    UsersManifest("runtime with a capital", _model('"modelVersion": "1.0"', '"runtime": "Python"')),
    UsersManifest(
        "runtime as the enum's name", _model('"modelVersion": "1.0"', '"runtime": "PYTHON3"'), runtime="python3"
    ),
    UsersManifest("runtime lsp", _model('"modelVersion": "1.0"', '"runtime": "lsp"'), runtime="LSP"),
    UsersManifest("path of the packer's machine", '{"model": {"modelName": "m", "handler": "/home/user/code/h.py"}}'),
    UsersManifest(
        "path and function",
        '{"model": {"modelName": "m", "handler": "/home/user/code/h.py:serve"}}',
        handler="h.py:serve",
    ),
    UsersManifest("relative path of the packer", '{"model": {"modelName": "m", "handler": "../code/h.py"}}'),
    UsersManifest("folder that was flattened", '{"model": {"modelName": "m", "handler": "code/h.py"}}'),
    UsersManifest("handler without .py", '{"model": {"modelName": "m", "handler": "/srv/h:serve"}}', handler="h:serve"),
    UsersManifest("module and function", '{"model": {"modelName": "m", "handler": "h:serve"}}', handler="h:serve"),
    UsersManifest(
        "bundled handler", '{"model": {"modelName": "m", "handler": "image_classifier"}}', handler="image_classifier"
    ),
    UsersManifest("no handler", '{"model": {"modelName": "m"}}', handler=None),
    UsersManifest(
        "files by the packer's paths",
        _model('"serializedFile": "/home/user/model.pt", "configFile": "../conf/config.yaml", "modelFile": ""'),
        files=(("serializedFile", "model.pt"), ("configFile", "config.yaml"), ("modelFile", "")),
    ),
    UsersManifest(
        "several weights", _model('"serializedFile": "a.pt, b.pt"'), files=(("serializedFile", "a.pt, b.pt"),)
    ),
    UsersManifest(
        "keys of other packers",
        _model(
            '"extensions": "x.txt", "requirementsFile": "", "extra": {"a": [1]}, "modelVersion": "1.0"',
            '"specificationVersion": "1.0", "implementationVersion": "1.0", "modelServerVersion": "1.0",'
            ' "license": "Apache 2.0", "publisher": {"author": "me"}, "runtime": "python"',
        ),
    ),
    UsersManifest("byte order mark, Windows line ends", "\ufeff" + _model('\r\n"modelVersion": "1.0"\r\n')),
    UsersManifest(
        "comments and a comma too many", "// by hand\n" + _model('"modelVersion": "1.0", /* kept */') + "\n# end\n"
    ),
    UsersManifest("quotes of a script", "{'runtime': 'python', 'model': {modelName: 'm'; handler = h.py}}"),
    UsersManifest("key given twice", _model('"modelVersion": "1.0", "modelVersion": "3.0"'), version="3.0"),
    UsersManifest("accents and escapes", _model('"description": "für \\u00e9 \\ud83d\\ude00", "modelVersion": "1.0"')),
]
