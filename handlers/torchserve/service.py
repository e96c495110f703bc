"""A loaded handler that speaks TorchServe's frames: its class `Service`, for tools and tests.

Names are looked up here when they are used, so that a test that replaces one replaces what runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wsgi_ts.handlers.metrics.store import emit_metrics
from wsgi_ts.handlers.serving import service as serving
from wsgi_ts.handlers.serving.context import Context, RequestProcessor
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.loader import Entry
from wsgi_ts.handlers.serving.results import Answer
from wsgi_ts.handlers.toolkit.utils import get_yaml_config
from wsgi_ts.handlers.torchserve.wire import create_predict_response, predict_frame

PREDICTION_METRIC = serving.PREDICTION_METRIC
__all__ = ["PREDICTION_METRIC", "PredictionException", "Service", "emit_metrics"]


class Service:
    """A loaded handler and its context.

    Args:
        model_name: name under which the model is registered.
        model_dir: folder of the extracted archive.
        manifest: the archive's manifest, None where it has none.
        entry_point: called with (data, context) for each batch.
        gpu: index of the GPU to use, None for CPU.
        batch_size: the largest batch the handler will be given.
        limit_max_image_pixels: whether Pillow's limit for huge images stays in force.
        metrics_cache: takes the handler's metrics.
    """

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Any,
        entry_point: Callable[[Any, Any], Any] | None,
        gpu: int | None,
        batch_size: int | None,
        limit_max_image_pixels: bool = True,
        metrics_cache: Any = None,
    ) -> None:
        model = manifest.get("model") if isinstance(manifest, Mapping) else None
        config_file = (model or {}).get("configFile")
        self._context = Context(
            model_name,
            model_dir,
            manifest,
            batch_size,
            gpu,
            limit_max_image_pixels=limit_max_image_pixels,
            metrics=metrics_cache,
            model_yaml_config=get_yaml_config(os.path.join(model_dir, config_file)) if config_file else {},
        )
        self._entry_point = entry_point
        self.cl_socket: Any = None

    @property
    def context(self) -> Context:
        """What the handler is given at every call."""
        return self._context

    def set_cl_socket(self, cl_socket: Any) -> None:
        """Takes the connection over which chunks of streamed answers go."""
        self.cl_socket = cl_socket

    @staticmethod
    def retrieve_data_for_inference(
        batch: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[list[RequestProcessor], list[dict[str, Any]], dict[int, str]]:
        """Returns headers and row of each request of an inference command, and the request ids by row.

        Raises:
            ValueError: there is no batch.
        """
        if batch is None:
            raise ValueError("Received invalid inputs")
        requests = [_request(fields) for fields in batch]
        headers = [RequestProcessor(dict(request.headers)) for request in requests]
        return headers, [request.row for request in requests], {i: r.request_id for i, r in enumerate(requests)}

    def predict(self, batch: Sequence[Mapping[str, Any]]) -> bytearray:
        """Runs the handler on the requests of an inference command; returns the frame that answers it.

        Raises:
            ValueError: there is no batch.
        """
        headers, rows, request_ids = self.retrieve_data_for_inference(batch)
        context = self._context
        context.cl_socket = self._send_chunk
        requests = [
            Request(request_ids[row], data, headers[row].get_request_properties()) for row, data in enumerate(rows)
        ]
        answers = self._engine().predict(requests)
        if answers and all(answer.error for answer in answers):
            text = bytes(answers[0].body).decode("utf-8", "replace")
            return create_predict_response(None, request_ids, text, answers[0].status)
        for row, answer in enumerate(answers):
            if answer.error:
                context.set_response_status(answer.status, answer.phrase, row)
        bodies = [answer.body for answer in answers]
        return create_predict_response(bodies, request_ids, "Prediction success", 200, context=context)

    def initialize(self, initialize: Callable[[Any], Any]) -> None:
        """Runs the handler's `initialize`, which may be a coroutine function, with the context."""
        self._engine()._settle(initialize(self._context))

    def close(self) -> None:
        """Gives back what serving took. The last call."""
        self._engine().close()

    def _engine(self) -> serving.Service:
        """What runs the handler; its event loop stays from one batch to the next."""
        engine: serving.Service | None = self.__dict__.get("_running")
        if engine is None:
            entry = Entry(self._call, self._call_nothing)
            engine = self.__dict__["_running"] = serving.Service(entry, self._context)
        return engine

    def _call(self, data: Any, context: Any) -> Any:
        """Looked up each time: the loader sets it after `initialize`."""
        if self._entry_point is None:
            raise RuntimeError(f"The service of {self._context.model_name} has no entry point")
        return self._entry_point(data, context)

    def _call_nothing(self, context: Any) -> None:
        """The loader has called `initialize` itself."""

    def _send_chunk(self, index: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
        if self.cl_socket is not None:
            row = (self._context.request_ids[index], Answer(status, phrase, headers, body))
            self.cl_socket.sendall(predict_frame(200, "Intermediate Prediction success", [row]))


def _request(fields: Mapping[str, Any]) -> Request:
    parameters = fields["parameters"]
    headers: dict[str, Any] = {item["name"]: {"content-type": item["contentType"]} for item in parameters}
    headers |= {pair["name"].decode("latin-1"): pair["value"].decode("latin-1") for pair in fields.get("headers") or ()}
    return Request(fields["requestId"].decode("latin-1"), {item["name"]: item["value"] for item in parameters}, headers)
