"""How every answer of the REST interfaces looks: constant headers, pretty JSON, TorchServe's error bodies.

Hop-by-hop headers (`connection`, `transfer-encoding`) belong to the web worker, not to the app.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import falcon

from wsgi_ts.errors import (
    BadRequest,
    InternalServerError,
    MethodNotAllowed,
    OutOfResources,
    PayloadTooLarge,
    ResourceNotFound,
    ServerError,
)

log = logging.getLogger(__name__)

#: Sent with every answer. Names in lower case, as Falcon keeps them: a later `set_header` replaces its value.
BASE_HEADERS: dict[str, str] = {
    "pragma": "no-cache",
    "cache-control": "no-cache; no-store, must-revalidate, private",
    "expires": "Thu, 01 Jan 1970 00:00:00 UTC",
}
JSON_TYPE = "application/json"
#: All that a client learns of a defect of the server.
UNEXPECTED = "Internal server error; the server's log names this request by its x-request-id."
#: The environ key under which the web worker hands down the id it gave to the request.
REQUEST_ID_KEY = "wsgi_ts.request_id"
#: Under our web worker: the head as it was received, without the token.
HEAD_KEY = "wsgi_ts.head"
#: Where the web worker puts what is wrong with a request that it could not read.
ERROR_KEY = "wsgi_ts.error"


class Response(falcon.Response):
    """A Falcon response that starts with TorchServe's constant headers.

    One dict copy a request instead of three `set_header` calls: all predictions pass here.
    """

    __slots__ = ()

    #: The headers a new response starts with; `response_type` makes subclasses with more of them.
    base_headers: Mapping[str, str] = BASE_HEADERS

    def __init__(self, options: falcon.ResponseOptions | None = None) -> None:
        """Makes an empty 200 answer with the constant headers."""
        super().__init__(options)
        self._headers = dict(self.base_headers)

    def put_header(self, name: str, value: str) -> None:
        """Sets one header without `set_header`'s checks: a lower-case name, a value known to be clean."""
        self._headers[name] = value

    def drop_headers(self) -> None:
        """Removes every header set so far, the constant ones included."""
        self._headers.clear()


class RequestIdHeader:
    """Falcon middleware: every answer names its request in `x-request-id`.

    The web worker has made the id by then; under another WSGI server one is made here.
    """

    def process_request(self, req: falcon.Request, resp: Response) -> None:
        """Copies the id from the environ, or makes one and leaves it there for the resource."""
        request_id = req.env.get(REQUEST_ID_KEY)
        if request_id is None:
            request_id = req.env[REQUEST_ID_KEY] = str(uuid.uuid4())
        resp.put_header("x-request-id", request_id)
        error = req.env.get(ERROR_KEY)
        if error is not None:
            raise error


def response_type(extra_headers: Mapping[str, str]) -> type[Response]:
    """Returns the response class of one app, whose answers carry these (lower-case) headers besides `BASE_HEADERS`."""
    if not extra_headers:
        return Response
    headers = {**BASE_HEADERS, **extra_headers}
    return type("ResponseWithExtraHeaders", (Response,), {"__slots__": (), "base_headers": headers})


def encode_json(body: Any) -> bytes:
    """Returns the JSON text TorchServe sends: indented by two spaces, not escaped beyond need, a newline at the end.

    A lone surrogate (a client can send one in a JSON body, and error texts quote it) becomes a question mark.
    """
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def write_json(resp: falcon.Response, status: int, body: Any) -> None:
    """Makes `resp` a JSON answer; the order of the body's keys is kept."""
    resp.status = status
    resp.set_header("content-type", JSON_TYPE)
    resp.data = encode_json(body)


def write_error(resp: falcon.Response, error: ServerError) -> None:
    """Makes `resp` the answer to a failed request: `{code, type, message}`, nothing for a body too large."""
    if isinstance(error, PayloadTooLarge):
        if isinstance(resp, Response):
            resp.drop_headers()
        resp.status = error.status
        resp.data = b""
        return
    write_json(resp, error.status, error.to_dict())
    if error.retry_after_s:
        resp.set_header("retry-after", str(error.retry_after_s))
    if error.status == HTTPStatus.UNAUTHORIZED:
        resp.set_header("www-authenticate", "Bearer")


def prediction_error(error: ServerError) -> ServerError:
    """Returns the error of a prediction as HTTP tells it.

    What a handler finds too large is no body that the server refuses: TorchServe makes its 413 a 507, too.
    """
    if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and not isinstance(error, PayloadTooLarge):
        return OutOfResources(error.message)
    return error


def install_error_handlers(app: falcon.App[Any, Any]) -> None:
    """Makes every exception that leaves a resource, or Falcon itself, come out as TorchServe's error JSON."""
    app.add_error_handler(ServerError, _on_server_error)
    app.add_error_handler(falcon.HTTPError, _on_http_error)
    app.add_error_handler(Exception, _on_unexpected)


def from_http_error(error: falcon.HTTPError) -> ServerError:
    """Falcon's own errors (no route, wrong method, bad input) in TorchServe's words."""
    status = error.status_code
    if status == falcon.http_status_to_code(falcon.HTTP_404):
        return ResourceNotFound()
    if status == falcon.http_status_to_code(falcon.HTTP_405):
        return MethodNotAllowed()
    if status == falcon.http_status_to_code(falcon.HTTP_413):
        return PayloadTooLarge("")
    message = error.description or error.title or "Invalid HTTP message."
    if status < falcon.http_status_to_code(falcon.HTTP_500):
        return BadRequest(message, status=status)
    return InternalServerError(message, status=status)


def head_of(req: falcon.Request) -> bytes:
    """The request's head for a handler's view of the headers: as received, or again from what WSGI left of it."""
    raw: bytes | None = req.env.get(HEAD_KEY)
    if raw is not None:
        return raw
    lines = [f"{req.method} {req.relative_uri} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in req.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def _on_server_error(req: falcon.Request, resp: falcon.Response, error: ServerError, params: Any) -> None:
    write_error(resp, error)
    # The traceback holds the frames of all callers, some of which hold the error: together with what was received they
    # would wait for the garbage collector, which runs seldom in a web worker.
    error.__traceback__ = None


def _on_http_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    write_error(resp, from_http_error(error))
    error.__traceback__ = None  # as above


def _on_unexpected(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """The traceback goes to the log under the request's id; the client learns only where to look."""
    request_id = req.env.get(REQUEST_ID_KEY, "-")
    log.error("Unexpected error in request %s, %s %s", request_id, req.method, req.path, exc_info=error)
    write_error(resp, InternalServerError(UNEXPECTED))
