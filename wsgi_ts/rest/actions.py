"""What a request asks for, in the words of the plugins that say who may: an action, and a model."""

from __future__ import annotations

from urllib.parse import parse_qs

from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.dataplane.routes import prediction_parts
from wsgi_ts.errors import ServerError
from wsgi_ts.security.access import OPEN_PATHS

_MODEL_ACTIONS = {"GET": "describe", "HEAD": "describe", "OPTIONS": "describe", "PUT": "scale", "DELETE": "unregister"}
#: By what a register call names what it registers.
_NAMED_BY = {"models": "model_name", "workflows": "workflow_name"}


def needs_nobody(path: str) -> bool:
    """Whether anybody may ask for a path: that of the API description, or a probe's."""
    return path.rstrip("/") in OPEN_PATHS


def action_of(kinds: frozenset[str], method: str, path: str, query: str) -> tuple[str, str]:
    """Reads a request.

    `path` is decoded, `query` as sent.

    Returns:
        predict, explain, describe, register, scale, unregister, metrics, ping or other; and the name of the model or
        workflow, empty where none is named there.
    """
    parts = path.strip("/").split("/")
    if "inference" in kinds:
        predicted = _prediction(method, path, query)
        if predicted is not None:
            return predicted
        if parts[0].lower() == "wfpredict" and len(parts) > 1:
            return "predict", _as_text(parts[1])
        if parts == ["ping"]:
            return "ping", ""
    if parts == ["metrics"]:
        return "metrics", ""
    if parts[0] in _NAMED_BY:
        if len(parts) == 1:
            name = parse_qs(query).get(_NAMED_BY[parts[0]], [""])[0]
            return ("register", name) if method == "POST" else ("describe", "")
        return _MODEL_ACTIONS.get(method, "other"), _as_text(parts[1])
    if parts[:2] == ["v1", "models"] and len(parts) > 2:
        return "describe", _as_text(parts[2])
    if parts[0] == "v2":
        return _of_open_inference(parts)
    return ("describe" if parts == ["plugins"] else "other"), ""


def _of_open_inference(parts: list[str]) -> tuple[str, str]:
    """What a path of the open inference protocol asks for, but for predictions."""
    if parts[1:2] == ["models"] and len(parts) > 2:
        return "describe", _as_text(parts[2])
    if parts[1:3] == ["repository", "models"] and len(parts) == 5:
        return {"load": "register", "unload": "unregister"}.get(parts[4], "other"), _as_text(parts[3])
    return ("ping" if parts[1:2] == ["health"] else "describe"), ""


def _prediction(method: str, path: str, query: str) -> tuple[str, str] | None:
    try:
        named = prediction_parts(path, query)
    except ServerError:
        return "predict", ""
    if named is None:
        return None
    name, _, _, flags = named
    action = "describe" if method == "OPTIONS" else "explain" if flags & RequestFlag.EXPLAIN else "predict"
    return action, _as_text(name)


def _as_text(part: str) -> str:
    return part.encode("latin-1", "replace").decode("utf-8", "replace")
