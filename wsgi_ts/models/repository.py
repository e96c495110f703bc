"""The model repository of the open inference protocol: what is there, load, unload. REST and gRPC ask here.

A model is loaded from the model store, by the name of its archive; register calls can do more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import BadRequest, ModelNotFound, ServerError
from wsgi_ts.models.arguments import LOAD_PARAMETERS, MAX_PAGE, read_argument
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.stores import archive_stem, startup_archives

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"


class ModelRepository:
    """Models that are loaded, and archives that are not. Its calls wait for the supervisor."""

    def __init__(self, config: Config, control: ControlPlane) -> None:
        self._config = config
        self._control = control

    def index(self, *, only_ready: bool) -> list[dict[str, str]]:
        """Lists the versions that are loaded and the archives that are not; or only those that are ready."""
        loaded = [row for name in self._loaded() for row in self._versions(name)]
        names = {row["name"] for row in loaded}
        others = [
            {"name": name, "version": "", "state": UNAVAILABLE, "reason": "not loaded"}
            for name in sorted(self._archives().keys() - names)
        ]
        return [row for row in (*loaded, *others) if not only_ready or row["state"] == READY]

    def load(self, model: str, parameters: Mapping[str, Any]) -> None:
        """Loads a model, and waits until a worker is ready; one that is loaded stays as it is.

        Args:
            model: the name of its archive, without suffix.
            parameters: of LOAD_PARAMETERS.

        Raises:
            BadRequest: there is no such parameter, or its value is none.
            ModelNotFound: there is no such archive.
            ServerError: it cannot be loaded.
        """
        if parameters.keys() - LOAD_PARAMETERS.keys():
            raise BadRequest(f"parameters may be {', '.join(LOAD_PARAMETERS)}")
        if model in self._loaded():
            return
        archive = self._archives().get(model)
        if archive is None:
            raise ModelNotFound.named(model)
        arguments = {name: read_argument(name, LOAD_PARAMETERS[name], value) for name, value in parameters.items()}
        arguments = {"initial_workers": 1, **arguments}
        self._control.call("register_model", url=archive, model_name=model, synchronous=True, **arguments)

    def unload(self, model: str) -> None:
        """Unloads all versions of a model, when what waits is answered; raises ModelNotFound where it is not loaded."""
        versions = self._describe(model)
        (default,) = self._describe(model, None)
        # The default version goes last: no other can before it.
        for version in sorted(versions, key=lambda each: each["modelVersion"] == default["modelVersion"]):
            self._control.call("unregister_model", model_name=model, version=version["modelVersion"])

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
    return {"name": description["modelName"], "version": description["modelVersion"], "state": state, "reason": reason}
