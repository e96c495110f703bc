"""The files of a new plugin: a package that can be installed, with its entry point and a test that starts a server."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
dependencies = ["wsgi-ts"]

[project.entry-points."wsgi_ts.endpoints"]
{name} = "{module}:{module}"

[tool.setuptools]
py-modules = ["{module}"]
"""
_MODULE = '''\
"""`/{name}`: says hello."""

from wsgi_ts.plugins import endpoint

WSGI_TS_API = 1


@endpoint("{name}")
def {module}(req, resp, ctx):
    return {{"hello": req.get_param("name") or "world", "models": sorted(ctx.models)}}
'''
_TEST = """\
pytest_plugins = ["wsgi_ts.plugins.testing"]


def test_{module}(plugin_server):
    server = plugin_server("{module}.py")
    answer = server.get("/{name}?name=you")
    assert (answer.status, answer.json()["hello"]) == (200, "you")
"""


def write_plugin(group: str, name: str, folder: Path) -> list[str]:
    """Writes `folder/name` with a pyproject.toml, an `endpoint` and a test; returns what to tell the user.

    Raises:
        ValueError: no such group, or a name that cannot be one.
        FileExistsError: there is something of that name.
    """
    if group != "endpoint":
        raise ValueError(f"{group!r}: only an endpoint can be made so; docs/plugins.md has an example of every group")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r}: a name is of lower-case letters, digits and hyphens, such as model-ready")
    target = folder / name
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    target.mkdir(parents=True)
    module = name.replace("-", "_")
    files = {"pyproject.toml": _PYPROJECT, f"{module}.py": _MODULE, f"test_{module}.py": _TEST}
    for file, text in files.items():
        (target / file).write_text(text.format(name=name, module=module), encoding="utf-8")
    return [
        f"Wrote {target}: {', '.join(files)}",
        f"Try it:  wsgi-ts serve --ncs --model-store . --plugins-path {target}, then curl http://127.0.0.1:8080/{name}",
        f"Test it: pytest {target}",
    ]
