"""The inference API's resources: predictions and `/ping`.

A prediction comes here with its answer: the web worker submits it before the app is called and puts the finished
`Answer` into the environ. Under another WSGI server there is none, and the resource waits for it itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import falcon

from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.dataplane.blocking import BlockingPlane
from wsgi_ts.dataplane.routes import RoutingTable
from wsgi_ts.errors import PayloadTooLarge, ResourceNotFound, ServiceUnavailable
from wsgi_ts.http.form_field import is_form
from wsgi_ts.rest import openapi
from wsgi_ts.rest.responses import REQUEST_ID_KEY, Response, head_of, prediction_error, write_error, write_json

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

#: Under our web worker: the answer to a prediction, and for what is none the routing table.
ANSWER_KEY = "wsgi_ts.answer"
ROUTES_KEY = "wsgi_ts.routes"

#: In any case, and whatever stands behind the name.
_WORKFLOWS = re.compile(r"/wfpredict/[^/]", re.IGNORECASE)

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
        self._limit = instance.config.max_request_size
        self._plane = BlockingPlane(instance)

    def on_request(self, req: falcon.Request, resp: Response, **_: Any) -> None:
        """Answers with the prediction's status, headers and body."""
        answer: Answer | None = req.env.get(ANSWER_KEY)
        if answer is None:
            answer = self._predict(req)
        if answer.error is not None:
            write_error(resp, prediction_error(answer.error))
            return
        # TorchServe sends an empty reason phrase unless the handler has set one.
        resp.status = f"{answer.status} {answer.phrase}"
        for name, value in answer.headers:
            if name.lower() != "x-request-id":  # the id that logs and traces have stays
                resp.put_header(name.lower(), value)
        if answer.stream is not None:
            resp.stream = answer.stream
        else:
            resp.data = answer.body  # type: ignore[assignment]

    def on_options(self, req: falcon.Request, resp: Response, **_: Any) -> None:
        """Answers with the API description of the model."""
        target = self.routes(req).target(req.env["PATH_INFO"], req.query_string)
        if target is None:
            raise ResourceNotFound()
        if target.error is not None and not isinstance(target.error, ServiceUnavailable):
            raise target.error
        write_json(resp, 200, openapi.model_document(target.model_name, target.version))

    def routes(self, req: falcon.Request) -> RoutingTable:
        """Returns the newest routing table."""
        routes: RoutingTable | None = req.env.get(ROUTES_KEY)
        return routes or self._plane.routes

    def _predict(self, req: falcon.Request) -> Answer:
        """Submits the request and waits, under a server other than ours."""
        if ROUTES_KEY in req.env:  # under our web worker every prediction comes with its answer; it must never wait
            raise ResourceNotFound()
        routes = self._plane.routes
        target = routes.target(req.env["PATH_INFO"], req.query_string)
        if target is None:
            raise ResourceNotFound()
        if (req.content_length or 0) > self._limit:
            raise self._plane.refuse(target, PayloadTooLarge(""))
        # `wsgi.input` ends where the body ends under gunicorn, chunked bodies included.
        body = req.env["wsgi.input"].read(self._limit + 1)
        if len(body) > self._limit:
            raise self._plane.refuse(target, PayloadTooLarge(""))
        content_type = (req.content_type or "").encode("latin-1")
        if target.reads_form and is_form(content_type):
            target = routes.form_target(content_type, body)
        return self._plane.predict(target, req.env[REQUEST_ID_KEY], head_of(req), content_type, body)


class Ping:
    """`/ping`, with any method."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 Healthy or 500 Unhealthy."""
        routes = self._predictions.routes(req)
        is_healthy = routes.healthy and not routes.draining
        write_json(resp, 200 if is_healthy else 500, {"status": "Healthy" if is_healthy else "Unhealthy"})


class Probes:
    """`/livez`, `/readyz` and `/startupz`, with any method: what Kubernetes asks, without a token."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def on_request_live(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200: it answers."""
        write_json(resp, 200, {"live": True})

    def on_request_ready(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 while requests are welcome, else 503."""
        ready = self._predictions.routes(req).ready
        write_json(resp, 200 if ready else 503, {"ready": ready})

    def on_request_started(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 once the models of the start are loaded, until then 503."""
        started = self._predictions.routes(req).started
        write_json(resp, 200 if started else 503, {"started": started})


def add_routes(app: falcon.App[Any, Any], instance: Instance) -> Predictions:
    """Adds the inference API's routes to an app; returns the resource that runs models."""
    predictions = Predictions(instance)
    for route in _ROUTES:
        app.add_route(route, predictions)
    app.add_route("/ping", Ping(predictions))
    app.add_sink(predictions.on_request, _WORKFLOWS)
    probes = Probes(predictions)
    app.add_route("/livez", probes, suffix="live")
    app.add_route("/readyz", probes, suffix="ready")
    app.add_route("/startupz", probes, suffix="started")
    return predictions
