"""The open inference protocol (KServe v2) besides `infer` and `explain`, which are predictions like others.

Only with `ts_open_inference_protocol`. TorchServe answers `/v2`, the two health paths and
501 for versions; `/v2/models/{model}` and its `ready` are what KServe's clients ask besides.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import falcon

from wsgi_ts import TORCHSERVE_VERSION
from wsgi_ts.errors import ResourceNotFound
from wsgi_ts.rest.responses import write_json

if TYPE_CHECKING:
    from wsgi_ts.rest.inference import Predictions

#: A path with more segments than these, `versions` among them, asks for a model's version.
_MOST_SEGMENTS = 4
_VERSIONS = re.compile(r".*/versions")


class ServerStatus:
    """`/v2`, `/v2/health/live` and `/v2/health/ready`, with any method."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The server's name and version."""
        # "extenstion" is TorchServe's spelling, which clients have to look for.
        extensions = ["kserve", "kubeflow"]
        write_json(resp, 200, {"name": "Torchserve", "version": TORCHSERVE_VERSION, "extenstion": extensions})

    def on_request_live(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The server answers."""
        write_json(resp, 200, {"live": True})

    def on_request_ready(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 while requests are welcome, else 503; whether a model is ready, its own path says."""
        ready = self._predictions.routes(req).ready
        write_json(resp, 200 if ready else 503, {"ready": ready})


class ModelStatus:
    """`/v2/models/{model}` and `/v2/models/{model}/ready`."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def on_get(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """The model's versions; what its tensors look like is known to its handler alone."""
        _, versions = self._predictions.routes(req).versions(model)
        body = {"name": model, "versions": sorted(versions), "platform": "", "inputs": [], "outputs": []}
        write_json(resp, 200, body)

    def on_get_ready(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """200 when a worker of the default version is ready, else 503."""
        default, versions = self._predictions.routes(req).versions(model)
        ready = versions.get(default, False)
        write_json(resp, 200 if ready else 503, {"name": model, "ready": ready})


class ModelV1:
    """`/v1/models/{model}`, where KServe's clients of the first protocol ask before they predict."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def on_get(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """200 when a worker of the default version is ready, else 503."""
        default, versions = self._predictions.routes(req).versions(model)
        ready = versions.get(default, False)
        write_json(resp, 200 if ready else 503, {"name": model, "ready": ready})


def refuse_versions(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
    """501 for a path that names a model's version; 404 for what only looks so."""
    if len(req.path.rstrip("/").split("/")) - 1 <= _MOST_SEGMENTS:
        raise ResourceNotFound()
    write_json(resp, 501, {"error": "Model versioning is not yet supported."})


def add_routes(app: falcon.App[Any, Any], predictions: Predictions) -> None:
    """Adds the protocol's routes to the app of an inference listener."""
    server, model = ServerStatus(predictions), ModelStatus(predictions)
    app.add_route("/v2", server)
    app.add_route("/v2/health/live", server, suffix="live")
    app.add_route("/v2/health/ready", server, suffix="ready")
    app.add_route("/v2/models/{model}", model)
    app.add_route("/v2/models/{model}/ready", model, suffix="ready")
    app.add_sink(refuse_versions, _VERSIONS)
