"""`/debug/traces`: the last slow, failed and sampled requests, as JSON, on the management port."""

from __future__ import annotations

from typing import Any

import falcon

from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import BadRequest, ResourceNotFound
from wsgi_ts.rest.management import argument, integer_argument
from wsgi_ts.rest.responses import write_json
from wsgi_ts.tracing.records import FAILED, SAMPLED, SLOW

_STATUSES = (SLOW, FAILED, SAMPLED)


class Traces:
    """`/debug/traces` and `/debug/traces/{request_id}`."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lists them, the newest first, of one `model` or all, `status` slow, failed or sampled, at most `limit`."""
        status = argument(req, "status") or None
        if status not in (None, *_STATUSES):
            raise BadRequest(f"Parameter status is one of {', '.join(_STATUSES)}.")
        limit = integer_argument(req, "limit")
        wanted = {"model": argument(req, "model") or None, "status": status, "limit": limit}
        write_json(resp, 200, self._control.call("list_traces", timeout_s=QUICK_CALL_S, **wanted))

    def on_get_one(self, req: falcon.Request, resp: falcon.Response, request_id: str) -> None:
        """Tells of one request; 404 where nothing is kept of it."""
        found = self._control.call("find_trace", timeout_s=QUICK_CALL_S, request_id=request_id)
        if found is None:
            raise ResourceNotFound()
        write_json(resp, 200, found)


def add_routes(app: falcon.App[Any, Any], control: ControlPlane) -> None:
    """Gives `app`, that of a management (or combined) listener, these routes."""
    traces = Traces(control)
    app.add_route("/debug/traces", traces)
    app.add_route("/debug/traces/{request_id}", traces, suffix="one")
