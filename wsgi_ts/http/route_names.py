"""What HTTP requests are called in metrics: by method, status and the template of the path's route.

So there is a bounded number of names, whatever clients ask for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

#: Templates that are known; a series on the board names one by its place. What fits none is the first.
ROUTES: Final = (
    "_OTHER",
    "/predictions/{model_name}",
    "/predictions/{model_name}/{model_version}",
    "/explanations/{model_name}",
    "/explanations/{model_name}/{model_version}",
    "/invocations",
    "/models/{model_name}/invoke",
    "/{model_name}/predict",
    "/{model_name}/{model_version}/predict",
    "/v1/models/{model_name}:predict",
    "/v1/models/{model_name}:explain",
    "/v2/models/{model_name}/infer",
    "/v2/models/{model_name}/explain",
    "/wfpredict/{workflow_name}",
    "/ping",
    "/livez",
    "/readyz",
    "/startupz",
    "/metrics",
    "/",
    "/api-description",
    "/models",
    "/models/{model_name}",
    "/models/{model_name}/{model_version}",
    "/models/{model_name}/{model_version}/set-default",
    "/workflows",
    "/workflows/{workflow_name}",
    "/v1/models/{model_name}",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/{model_name}",
    "/v2/models/{model_name}/ready",
    "/v2/repository/index",
    "/v2/repository/models/{model_name}/load",
    "/v2/repository/models/{model_name}/unload",
    "/plugins",
    "/token",
    "/debug/traces",
    "/debug/traces/{request_id}",
    "/docs",
    "/console",
    "/console/data",
    "/console/events",
    "/console/inference",
    "/console/settings",
    "/console/tune",
)
#: Methods that are known, likewise.
METHODS: Final = ("_OTHER", "GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")
#: How many segments of paths that begin so count: what stands behind them is the handler's.
_MOST_SEGMENTS: Final = {"predictions": 3, "explanations": 3, "wfpredict": 2, "workflows": 2, "console": 2}
_METHOD_SHIFT: Final = 16
_ROUTE_SHIFT: Final = 32
_MASK: Final = 0xFFFF
#: Set in every key: the word of an unused series is 0.
_USED: Final = 1 << 63


def _by_length() -> dict[int, list[tuple[int, list[str]]]]:
    """The routes by how many segments they have, each as its segments; those with more literal ones first."""
    found: dict[int, list[tuple[int, list[str]]]] = {}
    for number, route in enumerate(ROUTES[1:], 1):
        parts = route.strip("/").split("/")
        found.setdefault(len(parts), []).append((number, parts))
    for routes in found.values():
        routes.sort(key=lambda each: sum(part.startswith("{") for part in each[1]))
    return found


_ROUTES: Final = _by_length()


@lru_cache(maxsize=1024)
def route_of(path: str) -> int:
    """The place in ROUTES of the template that a path fits; 0 where there is none."""
    parts = path.strip("/").split("/")
    if parts[0].lower() == "wfpredict":
        parts[0] = "wfpredict"
    parts = parts[: _MOST_SEGMENTS.get(parts[0], len(parts))]
    for number, route in _ROUTES.get(len(parts), ()):
        if all(_fits(part, wanted) for part, wanted in zip(parts, route, strict=True)):
            return number
    return 0


def _fits(part: str, wanted: str) -> bool:
    name, _, verb = wanted.partition("}")
    return bool(part) and part.endswith(verb) if name.startswith("{") else part == wanted


def series_key(method: int, route: int, status: int) -> int:
    """What a series of HTTP requests on the board is known by.

    Method and route are told by their places in METHODS and ROUTES; the status is 0 where several are counted together.
    """
    return _USED | route << _ROUTE_SHIFT | method << _METHOD_SHIFT | status


def series_labels(key: int) -> tuple[str, str, str]:
    """The method, the route and the status that a key names."""
    status = key & _MASK
    return (
        METHODS[key >> _METHOD_SHIFT & _MASK],
        ROUTES[key >> _ROUTE_SHIFT & _MASK],
        str(status) if status else ROUTES[0],
    )
