"""How paths are read: as TorchServe reads them, and not as Falcon does."""

from __future__ import annotations

from typing import Any

import falcon
from falcon.routing import CompiledRouter

from wsgi_ts.errors import MethodNotAllowed


class Router(CompiledRouter):
    """Falcon's router with TorchServe's reading of a path and of OPTIONS."""

    def __init__(self) -> None:
        super().__init__()
        # `on_request` takes the methods that have no responder of their own.
        self.options.default_to_on_request = True

    def find(self, uri: str, req: falcon.Request | None = None) -> Any:
        """Finds the resource of a path, however many slashes end it."""
        return super().find(uri.rstrip("/") if uri.endswith("/") else uri, req=req)

    def map_http_methods(self, resource: object, **kwargs: Any) -> Any:
        """Maps methods to responders; Falcon's own answer to OPTIONS is not wanted."""
        method_map: dict[str, Any] = dict(super().map_http_methods(resource, **kwargs))
        suffix = kwargs.get("suffix")
        fallback = getattr(resource, f"on_request_{suffix}" if suffix else "on_request", _method_not_allowed)
        method_map.setdefault("OPTIONS", fallback)
        return method_map


def _method_not_allowed(req: falcon.Request, resp: falcon.Response, **params: Any) -> None:
    raise MethodNotAllowed()
