"""A replica of Ray Serve that runs a model in an engine of ours.

Requests come on the replica's event loop and are awaited there: no thread waits for a model. HTTP requests are handed
to the model as bytes, with the head that the client has sent; calls through a handle as bytes or as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir  # the one place that says where Serve's logs are
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.dataplane.async_call import Call
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.errors import PayloadTooLarge, ResourceNotFound, ServerError
from wsgi_ts.http.form_field import is_form
from wsgi_ts.integrations.engine import Engine, EngineError
from wsgi_ts.rest.responses import BASE_HEADERS, JSON_TYPE, encode_json, prediction_error

log = logging.getLogger(__name__)


class ModelReplica:
    """One replica: an engine with one model. Ray makes it on its event loop.

    Args:
        archive: the model archive, as this machine finds it.
        arguments: of the register call.
        settings: keys of config.properties.

    Raises:
        EngineError: the engine cannot be started.
        ServerError: the model cannot be loaded.
    """

    def __init__(self, archive: str, arguments: Mapping[str, Any], settings: Mapping[str, object]) -> None:
        replica = serve.get_replica_context().replica_id
        self._engine = Engine(settings, Path(get_serve_logs_dir(), f"wsgi_ts_{replica.unique_id}"))
        try:
            self._model = self._engine.register(archive, **arguments)
            self._engine.attach()
        except ServerError as error:
            self._engine.stop()
            # Of an exception with an HTTP status Ray would show the class alone.
            raise EngineError(f"{archive}: {error.message}") from error
        except BaseException:
            self._engine.stop()
            raise

    # Requests

    async def __call__(self, request: Any) -> Any:
        """Answers a request of HTTP, or what a handle was called with (see `predict`)."""
        if isinstance(request, Request):
            return await self._answer(request)
        return await self.predict(request)

    async def predict(self, data: Any, headers: Mapping[str, str] | None = None) -> Any:
        """Returns the model's answer.

        Args:
            data: bytes, which are answered with bytes, or anything that JSON knows: then the answer is read as JSON.
            headers: what the handler sees of headers, besides the content type.

        Raises:
            ServerError: what a client of HTTP would have been told.
        """
        call = self._submit_data(data, headers or {})
        try:
            answer = await call.whole()
        except ServerError as error:
            raise _portable(error) from None
        finally:
            call.close()
        return answer if isinstance(data, bytes) else json.loads(answer)

    async def stream(self, data: Any, headers: Mapping[str, str] | None = None) -> AsyncIterator[bytes]:
        """Yields the parts of the model's answer as they come; for handles with `stream=True`.

        The arguments are those of `predict`; the parts are bytes in any case.

        Raises:
            ServerError: what a client of HTTP would have been told.
        """
        call = self._submit_data(data, headers or {})
        try:
            async for part in call:
                yield part
        except ServerError as error:
            raise _portable(error) from None
        finally:
            call.close()

    def _submit_data(self, data: Any, headers: Mapping[str, str]) -> Call:
        kind, body = ("application/octet-stream", data) if isinstance(data, bytes) else (JSON_TYPE, _json(data))
        fields = {"content-type": kind, **{name.lower(): value for name, value in headers.items()}}
        lines = "".join(f"{name}: {_one_line(value)}\r\n" for name, value in fields.items())
        head = f"POST /predictions/{quote(self._model)} HTTP/1.1\r\n{lines}\r\n".encode()
        try:
            return self._engine.submit(self._own_target(), head, [body], fields["content-type"].encode())
        except ServerError as error:
            raise _portable(error) from None

    async def _answer(self, request: Request) -> Response:
        body = await request.body()
        content_type = request.headers.get("content-type", "").encode("latin-1")
        try:
            target = self._target(request, content_type, body)
            call = self._engine.submit(target, _head_of(request), [body], content_type)
        except ServerError as error:
            return _error(error)
        try:
            await call.begin()
            if not call.is_streamed:
                return _response(call, await call.whole())
        except ServerError as error:
            call.close()
            return _error(error, call.request_id)
        except BaseException:
            # The client has gone.
            call.close()
            raise
        return StreamingResponse(_parts(call), call.status, _headers(call))

    def _target(self, request: Request, content_type: bytes, body: bytes) -> Target:
        """Returns what a path means: the server's own paths mean what they do there, and `/` is the model."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "")) or "/"
        if path == "/":
            return self._own_target()
        routes = self._engine.routes
        target = routes.target(path.encode().decode("latin-1"), request.url.query)
        if target is None:
            raise ResourceNotFound()
        if target.reads_form and is_form(content_type):
            return routes.form_target(content_type, body)
        return target

    def _own_target(self) -> Target:
        return self._engine.routes.version_target(self._model, None, flags=RequestFlag.URL_PATH)

    # What Ray asks for

    async def check_health(self) -> None:
        """Raises EngineError, which says what is wrong, where the model cannot be asked."""
        reason = await asyncio.to_thread(self._engine.state)
        if reason:
            raise EngineError(reason)
        default, versions = self._engine.routes.versions(self._model)
        if not versions[default]:
            raise EngineError(
                f"No worker of the model {self._model} is ready; the log in {get_serve_logs_dir()} says why"
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns what an autoscaling policy may go by, under the names that /metrics has."""
        return await asyncio.to_thread(self._engine.load, self._model)

    def __del__(self) -> None:
        """Ray calls it when the requests under way have ended, and waits for it."""
        engine: Engine | None = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


async def _parts(call: Call) -> AsyncIterator[bytes]:
    try:
        async for part in call:
            yield part
    finally:
        call.close()


def _response(call: Call, body: bytes) -> Response:
    call.close()
    return Response(body, call.status, _headers(call))


def _headers(call: Call) -> dict[str, str]:
    own = {name.lower(): value for name, value in call.headers}
    return {**BASE_HEADERS, **own, "x-request-id": call.request_id}


def _error(error: ServerError, request_id: str = "") -> Response:
    """Returns an error as the server itself sends it."""
    error = prediction_error(error)
    if isinstance(error, PayloadTooLarge):
        return Response(b"", error.status)
    headers = {**BASE_HEADERS, "content-type": JSON_TYPE, **({"x-request-id": request_id} if request_id else {})}
    if error.retry_after_s:
        headers["retry-after"] = str(error.retry_after_s)
    return Response(encode_json(error.to_dict()), error.status, headers)


def _head_of(request: Request) -> bytes:
    """Returns the head of a request as its client has sent it, with the names of headers in lower case."""
    scope = request.scope
    query = scope.get("query_string", b"")
    path = scope.get("raw_path") or scope["path"].encode()
    line = b"%b %b%b HTTP/1.1\r\n" % (scope["method"].encode(), path, b"?" + query if query else b"")
    return line + b"".join(b"%b: %b\r\n" % field for field in scope["headers"]) + b"\r\n"


def _portable(error: ServerError) -> ServerError:
    """Returns an error in the form that another process can read, whichever it is."""
    return ServerError.from_dict(prediction_error(error).to_dict())


def _json(data: Any) -> bytes:
    return json.dumps(data).encode()


def _one_line(value: str) -> str:
    return " ".join(value.split())
