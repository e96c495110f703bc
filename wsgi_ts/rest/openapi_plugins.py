"""Endpoints of plugins in an API description: what their authors say of them, in place of what they replace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from wsgi_ts.plugins.found import Found, found_in
from wsgi_ts.rest import schemas
from wsgi_ts.rest.plugin_endpoints import first_segment
from wsgi_ts.security.access import scope_of
from wsgi_ts.settings.config import Config

_WITH_BODY: Final = ("post", "put", "patch")


def with_endpoints(paths: dict[str, Any], kinds: Collection[str], config: Config) -> dict[str, Any]:
    """Returns the paths of a description with those of plugins, without the server's own that they take over."""
    endpoints = [each for each in found_in(config.found_plugins, "endpoints") if each.type in kinds]
    taken = {each.path for each in endpoints}
    takes_token = config.token_authorization and bool({"inference", "management"} & set(kinds))
    made = {path: item for path, item in paths.items() if first_segment(path) not in taken}
    for each in endpoints:
        scope = scope_of(kinds, f"/{each.path}") if takes_token else None
        made[f"/{each.path}"] = {row["method"]: _operation(each, row, scope) for row in each.operations}
    return made


def _operation(found: Found, row: Mapping[str, str], scope: str | None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": row["summary"],
        "description": row["description"],
        "operationId": f"plugin_{found.name}_{row['method']}",
        "tags": ["plugins"],
        "parameters": [],
        "responses": {
            "503": {"description": f"No answer within {found.timeout_s:g} s."},
            "default": {"description": "What the plugin answers."},
        },
    }
    if row["method"] in _WITH_BODY:
        operation["requestBody"] = {"content": schemas.INPUTS, "required": False}
    if scope is not None:
        operation["security"] = [{scope: []}]
    return operation
