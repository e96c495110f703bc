"""The inference API: Ping, Predictions and the two kinds of streams."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from wsgi_ts.batcher.shm.body_codec import pack_fields
from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.dataplane.async_call import Call
from wsgi_ts.dataplane.async_plane import AsyncPlane
from wsgi_ts.errors import ServerError
from wsgi_ts.rpc import messages
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.calls import Calls
from wsgi_ts.rpc.codes import Failure, bad_request, inference_failure
from wsgi_ts.rpc.prediction import PredictionMethod
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

NAME = f"{messages.INFERENCE}.InferenceAPIsService"
#: Longest id of a sequence, in bytes of UTF-8; a header of HTTP could not be much longer.
_MAX_SEQUENCE_BYTES = 4096


class Inference:
    """The methods of the service."""

    def __init__(self, plane: AsyncPlane, config: Config) -> None:
        self._plane = plane
        self._sequence_id = config.ts_header_key_sequence_id
        self._sequence_marks = (config.ts_header_key_sequence_start, config.ts_header_key_sequence_end)

    def service(self, calls: Calls) -> list[Method]:
        """Returns the methods, for the server."""
        messages_of = messages.PredictionsRequest, messages.PredictionResponse
        return calls.service(
            NAME,
            Method("Ping", self.ping, messages.Empty, messages.TorchServeHealthResponse),
            PredictionMethod("Predictions", *messages_of, self._submit_prediction, _response),
            Method("StreamPredictions", self.stream_predictions, *messages_of, answers_stream=True),
            Method(
                "StreamPredictions2", self.stream_predictions_2, *messages_of, takes_stream=True, answers_stream=True
            ),
        )

    async def ping(self, request: Any, rpc: RpcCall) -> Any:
        """Healthy or Unhealthy, as `/ping` says it."""
        routes = self._plane.routes
        health = "Healthy" if routes.healthy and not routes.draining else "Unhealthy"
        return messages.TorchServeHealthResponse(health=json.dumps({"status": health}, indent=2))

    async def stream_predictions(self, request: Any, rpc: RpcCall) -> None:
        """A message for each part of the answer; one for a handler that does not stream."""
        call = self._submit(request, "StreamPredictions", rpc)
        try:
            async for part in call:
                await rpc.write(messages.PredictionResponse(prediction=part))
        finally:
            call.close()

    async def stream_predictions_2(self, requests: AsyncIterator[Any], rpc: RpcCall) -> None:
        """Requests of sequences: each is submitted as it comes, and answered as its handler sends; errors, too.

        The answers of a sequence come in the order of its requests.
        """
        writing = asyncio.Lock()
        answering: set[asyncio.Task[None]] = set()
        last_of: WeakValueDictionary[str, asyncio.Task[None]] = WeakValueDictionary()
        first = ""
        try:
            async for request in requests:
                first = first or request.sequence_id
                try:
                    call = self._submit_in_sequence(request, rpc)
                except (ServerError, Failure) as error:
                    await _write(rpc, writing, _refusal(request, error))
                    continue
                before = last_of.get(request.sequence_id)
                task = asyncio.create_task(self._answer_in_stream(request, call, before, rpc, writing))
                last_of[request.sequence_id] = task
                answering.add(task)
                task.add_done_callback(answering.discard)
                # Not in the task: one that is cancelled before its first step does nothing at all.
                task.add_done_callback(partial(_close, call))
            if first:
                log.info("SequenceId %s is completed", first)
            await asyncio.gather(*answering)
        finally:
            for task in answering:
                task.cancel()
            await asyncio.gather(*answering, return_exceptions=True)

    async def _answer_in_stream(
        self,
        request: Any,
        call: Call,
        before: asyncio.Task[None] | None,
        rpc: RpcCall,
        writing: asyncio.Lock,
    ) -> None:
        try:
            if before is not None:
                await asyncio.wait([before])
            async for part in call:
                response = messages.PredictionResponse(prediction=part, sequence_id=request.sequence_id)
                await _write(rpc, writing, response)
        except ServerError as error:
            await _write(rpc, writing, _refusal(request, error))

    def _submit_prediction(self, request: Any, rpc: RpcCall) -> Call:
        return self._submit(request, "Predictions", rpc)

    def _submit(self, request: Any, method: str, rpc: RpcCall) -> Call:
        if not request.model_name:
            raise bad_request("Parameter model_name is required.")
        routes = self._plane.routes
        target = routes.named_target(request.model_name, request.model_version or None, RequestFlag.FIELDS)
        head = f"POST /{NAME}/{method} HTTP/2.0\r\n"
        if request.sequence_id:
            head += self._sequence_lines(request)
        data = head.encode() + b"\r\n"
        rpc.trace = self._plane.begin_trace(target, data, rpc.metadata)
        return self._plane.submit(target, data, pack_fields(request.input), trace=rpc.trace)

    def _submit_in_sequence(self, request: Any, rpc: RpcCall) -> Call:
        if not request.sequence_id.strip():
            raise bad_request("Parameter sequenceId is required.")
        return self._submit(request, "StreamPredictions2", rpc)

    def _sequence_lines(self, request: Any) -> str:
        """Returns the header lines that tell a handler of the request's sequence.

        Whether it is the sequence's first or last request a client says by an input of the header's name.
        """
        sequence: str = request.sequence_id
        if len(sequence.encode()) > _MAX_SEQUENCE_BYTES or not sequence.isprintable():
            raise bad_request(f"Parameter sequenceId must be printable and have at most {_MAX_SEQUENCE_BYTES} bytes.")
        lines = f"{self._sequence_id}: {sequence}\r\n"
        for name in self._sequence_marks:
            if request.input.get(name, b"").lower() == b"true":
                lines += f"{name}: true\r\n"
        return lines


def _response(prediction: bytes) -> Any:
    return messages.PredictionResponse(prediction=prediction)


def _close(call: Call, _: asyncio.Task[None]) -> None:
    call.close()


async def _write(rpc: RpcCall, writing: asyncio.Lock, response: Any) -> None:
    """Writes one message: gRPC takes the next only when the one before it is gone."""
    async with writing:
        await rpc.write(response)


def _refusal(request: Any, error: ServerError | Failure) -> Any:
    """Returns an error as it stands in a stream that goes on."""
    failure = error if isinstance(error, Failure) else inference_failure(error)
    status = messages.Status(code=failure.code.value, message=failure.message)
    status.details.add().Pack(messages.ErrorInfo(reason=failure.reason))
    return messages.PredictionResponse(sequence_id=request.sequence_id, status=status)
