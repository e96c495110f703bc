"""What the API description says of an endpoint: its methods, and the text that its author has written for each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, Final

#: Methods of an endpoint that is called for all of them.
ANY_METHOD: Final = ("get", "post", "put", "delete", "patch")
#: A method of an endpoint's class, or of a Falcon resource. HEAD is GET without the body, OPTIONS has Falcon answer.
_RESPONDER: Final = re.compile(r"(?:do|on)_(get|post|put|delete|patch)")
_FALLBACK: Final = "on_request"
#: More of a docstring is no description.
_MOST_SUMMARY: Final = 200
_MOST_TEXT: Final = 4000


def operations_of(plugin: Any, path: str) -> tuple[Mapping[str, str], ...]:
    """Returns a row for each method of an endpoint: `method`, in lower case, `summary` and `description`.

    A method without a docstring has that of its class; an endpoint without any is called by its path.
    """
    own = _text_of(plugin)
    found = {match[1]: _text_of(getattr(plugin, name)) for name in dir(plugin) if (match := _RESPONDER.fullmatch(name))}
    if not found or hasattr(plugin, _FALLBACK):
        found = dict.fromkeys(ANY_METHOD, "") | found
    return tuple(_row(method, found[method] or own, path) for method in ANY_METHOD if method in found)


def _row(method: str, text: str, path: str) -> Mapping[str, str]:
    first, _, _ = text.partition("\n\n")
    summary = " ".join(first.split())[:_MOST_SUMMARY] or f"Endpoint {path} of a plugin."
    return {"method": method, "summary": summary, "description": text[:_MOST_TEXT] or summary}


def _text_of(thing: Any) -> str:
    """The docstring of a function, method or class itself: what an instance shows is that of whatever class it is."""
    if not inspect.isroutine(thing) and not inspect.isclass(thing):
        return ""
    text = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return inspect.cleandoc(text).strip() if isinstance(text, str) else ""
