"""The model repository of the open inference protocol, on the management API."""

from __future__ import annotations

from typing import Any

import falcon

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import BadRequest, MethodNotAllowed
from wsgi_ts.models.arguments import LOAD_PARAMETERS
from wsgi_ts.models.repository import ModelRepository
from wsgi_ts.rest.management import parse_body, read_body
from wsgi_ts.rest.responses import write_json
from wsgi_ts.settings.config import Config


class Repository:
    """`/v2/repository/index`, `/v2/repository/models/{model}/load` and `…/unload`.

    Args:
        config: the configuration; without its `enable_model_api` nothing is loaded or unloaded.
    """

    def __init__(self, config: Config, control: ControlPlane) -> None:
        self._may_change = config.enable_model_api
        self._models = ModelRepository(config, control)

    def on_post_index(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lists the versions that are loaded and the archives that are not; with `ready` only those that are ready."""
        only_ready = parse_body(read_body(req)).get("ready") is True
        write_json(resp, 200, self._models.index(only_ready=only_ready))

    def on_post_load(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """Loads a model, and waits until a worker is ready; one that is loaded stays as it is."""
        self._refuse_unless_enabled()
        given = parse_body(read_body(req)).get("parameters", {})
        if not isinstance(given, dict):
            raise BadRequest(f"parameters may be {', '.join(LOAD_PARAMETERS)}")
        self._models.load(model, given)
        write_json(resp, 200, {"name": model, "load": True})

    def on_post_unload(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """Unloads all versions of a model, when what waits for them is answered."""
        self._refuse_unless_enabled()
        self._models.unload(model)
        write_json(resp, 200, {"name": model, "unload": True})

    def _refuse_unless_enabled(self) -> None:
        if not self._may_change:
            raise MethodNotAllowed()


def add_routes(app: falcon.App[Any, Any], config: Config, control: ControlPlane) -> None:
    """Gives the app of a management listener the repository's routes."""
    repository = Repository(config, control)
    app.add_route("/v2/repository/index", repository, suffix="index")
    app.add_route("/v2/repository/models/{model}/load", repository, suffix="load")
    app.add_route("/v2/repository/models/{model}/unload", repository, suffix="unload")
