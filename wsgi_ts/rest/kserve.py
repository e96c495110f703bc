"""The open inference protocol (KServe v2) besides `infer` and `explain`, which are predictions like others.

Only with `ts_open_inference_protocol`. TorchServe answers `/v2`, the two health paths and
501 for versions; `/v2/models/{model}` and its `ready` are what KServe's clients ask besides.
"""

from __future__ import annotations

import re
from typing import Any

import falcon

from wsgi_ts import TORCHSERVE_VERSION
from wsgi_ts.errors import ResourceNotFound
from wsgi_ts.rest.inference import Predictions, Probes
from wsgi_ts.rest.responses import write_json

#: A path with more segments than these, `versions` among them, asks for a model's version.
_MOST_SEGMENTS = 4
_VERSIONS = re.compile(r".*/versions")


class ServerInfo:
    """`/v2`, with any method."""

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The server's name and version."""
        # "extenstion" is TorchServe's spelling, which clients have to look for.
        extensions = ["kserve", "kubeflow"]
        write_json(resp, 200, {"name": "Torchserve", "version": TORCHSERVE_VERSION, "extenstion": extensions})


class ModelStatus:
    """`/v2/models/{model}` and `/v2/models/{model}/ready`; the latter also as `/v1/models/{model}`."""

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


def refuse_versions(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
    """501 for a path that names a model's version; 404 for what only looks so."""
    if len(req.path.rstrip("/").split("/")) - 1 <= _MOST_SEGMENTS:
        raise ResourceNotFound()
    write_json(resp, 501, {"error": "Model versioning is not yet supported."})


def add_routes(app: falcon.App[Any, Any], predictions: Predictions) -> None:
    """Adds the protocol's routes to the app of an inference listener."""
    probes, model = Probes(predictions), ModelStatus(predictions)
    app.add_route("/v2", ServerInfo())
    app.add_route("/v2/health/live", probes, suffix="live")
    app.add_route("/v2/health/ready", probes, suffix="ready")
    app.add_route("/v2/models/{model}", model)
    app.add_route("/v2/models/{model}/ready", model, suffix="ready")
    app.add_sink(refuse_versions, _VERSIONS)


def add_v1_route(app: falcon.App[Any, Any], predictions: Predictions) -> None:
    """Adds `/v1/models/{model}`, where KServe's clients of the first protocol ask before they predict."""
    app.add_route("/v1/models/{model}", ModelStatus(predictions), suffix="ready")
