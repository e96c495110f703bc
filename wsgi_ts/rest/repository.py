"""The model repository of the open inference protocol, on the management API: what is there, load, unload.

A model is loaded from the model store, by the name of its archive; register calls can do more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import falcon

from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import BadRequest, MethodNotAllowed, ModelNotFound, ServerError
from wsgi_ts.models.arguments import LOAD_PARAMETERS, MAX_PAGE, read_argument
from wsgi_ts.rest.management import parse_body, read_body
from wsgi_ts.rest.responses import write_json
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.sources import archive_stem, startup_archives

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"


class Repository:
    """`/v2/repository/index`, `/v2/repository/models/{model}/load` and `…/unload`.

    Args:
        config: the configuration; without its `enable_model_api` nothing is loaded or unloaded.
        control: calls to the supervisor.
    """

    def __init__(self, config: Config, control: ControlPlane) -> None:
        self._config = config
        self._control = control

    def on_post_index(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lists the versions that are loaded and the archives that are not; with `ready` only those that are ready."""
        only_ready = parse_body(read_body(req)).get("ready") is True
        loaded = [row for name in self._loaded() for row in self._versions(name)]
        names = {row["name"] for row in loaded}
        others = [
            {"name": name, "version": "", "state": UNAVAILABLE, "reason": "not loaded"}
            for name in sorted(self._archives().keys() - names)
        ]
        write_json(resp, 200, [row for row in (*loaded, *others) if not only_ready or row["state"] == READY])

    def on_post_load(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """Loads a model, and waits until a worker is ready; one that is loaded stays as it is."""
        self._refuse_unless_enabled()
        given = parse_body(read_body(req)).get("parameters", {})
        if not isinstance(given, dict) or given.keys() - LOAD_PARAMETERS.keys():
            raise BadRequest(f"parameters may be {', '.join(LOAD_PARAMETERS)}")
        if model not in self._loaded():
            archive = self._archives().get(model)
            if archive is None:
                raise ModelNotFound.named(model)
            arguments = {name: read_argument(name, LOAD_PARAMETERS[name], value) for name, value in given.items()}
            arguments = {"initial_workers": 1, **arguments}
            self._control.call("register_model", url=archive, model_name=model, synchronous=True, **arguments)
        write_json(resp, 200, {"name": model, "load": True})

    def on_post_unload(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """Unloads all versions of a model, when what waits for them is answered."""
        self._refuse_unless_enabled()
        versions = self._describe(model)
        (default,) = self._describe(model, None)
        # The default version goes last: no other can before it.
        for version in sorted(versions, key=lambda each: each["modelVersion"] == default["modelVersion"]):
            self._control.call("unregister_model", model_name=model, version=version["modelVersion"])
        write_json(resp, 200, {"name": model, "unload": True})

    def _refuse_unless_enabled(self) -> None:
        if not self._config.enable_model_api:
            raise MethodNotAllowed()

    def _archives(self) -> dict[str, str]:
        """The archives of the model store by the name that a model of theirs gets here."""
        store = self._config.model_store
        return {} if store is None else {archive_stem(name): name for name in startup_archives(Path(store))}

    def _loaded(self) -> list[str]:
        names: list[str] = []
        token: str | None = "0"
        while token is not None:
            page = {"limit": MAX_PAGE, "next_page_token": int(token)}
            body = self._control.call("list_models", timeout_s=QUICK_CALL_S, **page)["body"]
            names += [row["modelName"] for row in body["models"]]
            token = body.get("nextPageToken")
        return names

    def _describe(self, model: str, version: str | None = "all") -> list[dict[str, Any]]:
        answer = self._control.call("describe_model", timeout_s=QUICK_CALL_S, model_name=model, version=version)
        return list(answer["body"])

    def _versions(self, model: str) -> list[dict[str, str]]:
        """The rows of a model's versions; none where it has gone meanwhile."""
        try:
            found = self._describe(model)
        except ServerError as error:
            if error.status != ModelNotFound.http_status:
                raise
            return []
        return [_row(each) for each in found]


def _row(description: dict[str, Any]) -> dict[str, str]:
    workers = description["workers"]
    ready = any(worker["status"] == READY for worker in workers)
    state, reason = (READY, "") if ready else (LOADING, "no worker is ready") if workers else (UNAVAILABLE, "no worker")
    return {
        "name": description["modelName"],
        "version": description["modelVersion"],
        "state": state,
        "reason": reason,
    }


def add_routes(app: falcon.App[Any, Any], config: Config, control: ControlPlane) -> None:
    """Gives the app of a management listener the repository's routes."""
    repository = Repository(config, control)
    app.add_route("/v2/repository/index", repository, suffix="index")
    app.add_route("/v2/repository/models/{model}/load", repository, suffix="load")
    app.add_route("/v2/repository/models/{model}/unload", repository, suffix="unload")
