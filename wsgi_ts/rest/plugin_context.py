"""The server as an endpoint plugin sees it: settings, models, and a way to run one."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import InternalServerError, ModelNotFound
from wsgi_ts.models.arguments import MAX_PAGE
from wsgi_ts.plugins.api import ModelView, Prediction, WorkerView
from wsgi_ts.rest.responses import encode_json
from wsgi_ts.settings.given import given_settings

if TYPE_CHECKING:
    from wsgi_ts.dataplane.blocking import BlockingPlane
    from wsgi_ts.instance.instance import Instance

#: Predictions of plugins under way at a time, in one process.
_SLOTS = 64
_NO_HEAD = b"POST / HTTP/1.1\r\n\r\n"


class PluginContext:
    """What an endpoint is called with; one for all plugins of a process. Any thread may use it."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._control = ControlPlane(instance.run_dir)
        self._lock = threading.Lock()
        self._plane: BlockingPlane | None = None

    @property
    def config(self) -> Mapping[str, str]:
        """The settings that are given, as the text in config.properties."""
        return given_settings(self._instance.config)

    @property
    def models(self) -> dict[str, ModelView]:
        """The registered models by name, as they are now."""
        return {view.name: view for name in self._names() if (view := self._view(name)) is not None}

    def predict(
        self,
        name: str,
        data: bytes,
        timeout: float | None = None,
        *,
        version: str | None = None,
        content_type: str = "",
    ) -> Prediction:
        """Runs a model (see `api.Context`); what goes wrong is in the answer, as a client would get it."""
        plane = self._open_plane()
        target = plane.routes.version_target(name, version)
        kind = content_type.encode("latin-1")
        answer = plane.predict(target, str(uuid.uuid4()), _head(content_type, data), kind, bytes(data), timeout)
        try:
            body = b"" if answer.error is not None else plane.body_of(answer)
        except InternalServerError as error:
            answer.error = error
        if answer.error is not None:
            headers = {"content-type": "application/json"}
            return Prediction(answer.error.status, headers, encode_json(answer.error.to_dict()))
        return Prediction(answer.status, {key.lower(): value for key, value in answer.headers}, body)

    def _names(self) -> list[str]:
        names: list[str] = []
        token: str | None = "0"
        while token is not None:
            page = {"limit": MAX_PAGE, "next_page_token": int(token)}
            body = self._control.call("list_models", timeout_s=QUICK_CALL_S, **page)["body"]
            names += [each["modelName"] for each in body["models"]]
            token = body.get("nextPageToken")
        return names

    def _view(self, name: str) -> ModelView | None:
        try:
            answer = self._control.call("describe_model", timeout_s=QUICK_CALL_S, model_name=name)
        except ModelNotFound:
            return None
        (said,) = answer["body"]
        workers = tuple(WorkerView(each["status"] == "READY", each["memoryUsage"]) for each in said["workers"])
        return ModelView(said["modelName"], said["modelVersion"], said["modelUrl"], workers)

    def _open_plane(self) -> BlockingPlane:
        """The way to the models: most plugins never need it, and it takes shared memory."""
        with self._lock:
            if self._plane is None:
                from wsgi_ts.dataplane.blocking import BlockingPlane

                self._plane = BlockingPlane(self._instance, _SLOTS)
            return self._plane


def _head(content_type: str, data: bytes) -> bytes:
    """What the handler sees as the request's head."""
    if not content_type:
        return _NO_HEAD
    return f"POST / HTTP/1.1\r\ncontent-type: {content_type}\r\ncontent-length: {len(data)}\r\n\r\n".encode("latin-1")
