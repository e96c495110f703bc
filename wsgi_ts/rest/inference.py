"""The inference API's resources: predictions and `/ping`.

A prediction comes here with its answer: the web worker submits it before the app is called and puts the finished
`Ticket` into the environ. Under another WSGI server no ticket is there, and the resource waits for the answer itself.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import falcon

from wsgi_ts.dataplane.plane import BlockingPlane, DataPlane, Ticket
from wsgi_ts.errors import PayloadTooLarge, ResourceNotFound, ServiceUnavailable, WorkflowNotFound
from wsgi_ts.http.form_field import is_form
from wsgi_ts.rest import openapi
from wsgi_ts.rest.responses import REQUEST_ID_KEY, Response, head_of, write_error, write_json

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

TICKET_KEY = "wsgi_ts.ticket"
PLANE_KEY = "wsgi_ts.plane"

_ROUTES = (
    "/predictions/{model}",
    "/predictions/{model}/{version}",
    "/predictions/{model}/{version}/{rest:path}",
    "/explanations/{model}",
    "/explanations/{model}/{version}",
    "/explanations/{model}/{version}/{rest:path}",
    "/invocations",
    "/models/{model}/invoke",
    "/v1/models/{model}:predict",
    "/v1/models/{model}:explain",
    "/v2/models/{model}/infer",
    "/v2/models/{model}/explain",
    "/{model}/predict",
    "/{model}/{version}/predict",
)


class Predictions:
    """Every route that runs a model."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._plane: DataPlane | None = None
        self._blocking: BlockingPlane | None = None
        self._lock = threading.Lock()

    def on_request(self, req: falcon.Request, resp: Response, **_: Any) -> None:
        """Answers with the ticket's status, headers and body."""
        ticket: Ticket | None = req.env.get(TICKET_KEY)
        if ticket is None:
            ticket = self._wait(req)
        if ticket.error is not None:
            write_error(resp, ticket.error)
            return
        # TorchServe sends an empty reason phrase unless the handler has set one.
        resp.status = f"{ticket.status} {ticket.phrase}"
        for name, value in ticket.headers:
            resp.put_header(name.lower(), value)
        if ticket.stream is not None:
            resp.stream = ticket.stream
        else:
            resp.data = ticket.body  # type: ignore[assignment]

    def on_options(self, req: falcon.Request, resp: Response, **_: Any) -> None:
        """The API description of the model."""
        target = self.plane(req).routes.target(req.env["PATH_INFO"], req.query_string)
        if target is None:
            raise ResourceNotFound()
        if target.error is not None and not isinstance(target.error, ServiceUnavailable):
            raise target.error
        write_json(resp, 200, openapi.model_document(target.model_name, target.version))

    def plane(self, req: falcon.Request) -> DataPlane:
        """The data plane of this process, with the newest routing table."""
        plane: DataPlane = req.env.get(PLANE_KEY) or self._planes()[0]
        plane.routes.refresh()
        return plane

    def _wait(self, req: falcon.Request) -> Ticket:
        if PLANE_KEY in req.env:  # under our web worker every prediction comes with a ticket; it must never wait
            raise ResourceNotFound()
        plane, blocking = self._planes()
        plane.routes.refresh()
        target = plane.routes.target(req.env["PATH_INFO"], req.query_string)
        if target is None:
            raise ResourceNotFound()
        limit = self._instance.config.max_request_size
        if (req.content_length or 0) > limit:
            raise PayloadTooLarge("")
        # `wsgi.input` ends where the body ends under gunicorn, chunked bodies included.
        body = req.env["wsgi.input"].read(limit + 1)
        if len(body) > limit:
            raise PayloadTooLarge("")
        content_type = (req.content_type or "").encode("latin-1")
        if target.reads_form and is_form(content_type):
            target = plane.routes.form_target(content_type, body)
        return blocking.predict(target, req.env[REQUEST_ID_KEY], head_of(req), content_type, body)

    def _planes(self) -> tuple[DataPlane, BlockingPlane]:
        with self._lock:
            if self._plane is None or self._blocking is None:
                instance = self._instance
                self._plane = DataPlane(instance.config, instance.run_dir, instance.prefix)
                self._blocking = BlockingPlane(self._plane)
            return self._plane, self._blocking


class Ping:
    """`/ping`, with any method."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 Healthy or 500 Unhealthy."""
        plane = self._predictions.plane(req)
        if plane.routes.healthy and not plane.routes.draining:
            write_json(resp, 200, {"status": "Healthy"})
        else:
            write_json(resp, 500, {"status": "Unhealthy"})


class Workflows:
    """`/wfpredict/{workflow}`: no workflow can be registered, so none is found."""

    def on_request(self, req: falcon.Request, resp: falcon.Response, workflow: str) -> None:
        """404, as for any unknown workflow."""
        raise WorkflowNotFound(f"Workflow not found: {workflow}")


def add_routes(app: falcon.App[Any, Any], instance: Instance) -> Predictions:
    """Adds the inference API's routes to an app; returns the resource that runs models."""
    predictions = Predictions(instance)
    for route in _ROUTES:
        app.add_route(route, predictions)
    app.add_route("/ping", Ping(predictions))
    app.add_route("/wfpredict/{workflow}", Workflows())
    return predictions
