"""From what a handler returned for one row to the answer of its request, or to a chunk of a streamed one."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Awaitable
from numbers import Integral
from typing import Any, NamedTuple

from wsgi_ts.handlers.serving import json_text
from wsgi_ts.handlers.serving.context import STREAM_NEXT, Context, RequestProcessor, StreamClosed
from wsgi_ts.handlers.serving.errors import BatchFailure, PredictionException

log = logging.getLogger(__name__)

PREDICTION_FAILED = "Prediction failed"
OUT_OF_RESOURCES = "Out of resources"
INVALID_OUTPUT = "Invalid model predict output"
WRONG_LENGTH = "number of batch response mismatched"
UNSUPPORTED_OUTPUT = "Unsupported model output data type."
INVALID_RESPONSE = "Invalid response from handler"
RESPONSE_TOO_LARGE = "Response is larger than max_response_size"

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
#: Set by the server alone: a handler's own value would break the framing of the answer.
_FRAMING_HEADERS = frozenset(
    ("content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "trailer", "te")
)
#: These statuses forbid a body, so a body would be read as the start of the next answer.
BODYLESS_STATUSES = frozenset((204, 205, 304))

Headers = list[tuple[str, str]]
Body = bytes | bytearray | memoryview


class Answer(NamedTuple):
    """The answer to one request. Where `error` is true, `body` is the message text of a JSON error answer."""

    status: int
    phrase: str
    headers: Headers
    body: Body
    error: bool = False


def send_intermediate_predict_response(
    ret: list[Any], req_id_map: dict[int, str], message: str, code: int, context: Context | None = None
) -> Awaitable[None] | None:
    """Sends one chunk of each row's answer; the elements that `handle` returns are the last chunks.

    Args:
        ret: one result per row.
        req_id_map: place in `ret` (whose status and headers are sent, too) -> id of the request that gets the chunk.
            An id that is none of the batch's stands for the request at that place.
        message: sent as the chunk where there is no result.
        code: 200, or the status that the answers are to have.
        context: the handler's context.

    Returns:
        With `asyncCommunication` something that may be awaited: it ends when the client has room for more chunks.

    Raises:
        ValueError: without a context there is nothing to send through.
        PredictionException: a result cannot be encoded, or status or headers are invalid.
        StreamClosed: all clients of the batch have gone, so that there is nothing left to do.
    """
    if context is None or context.cl_socket is None:
        raise ValueError("send_intermediate_predict_response needs the context that handle(data, context) was given")
    sent: Awaitable[None] | None = None
    row_of = {request_id: row for row, request_id in context.request_ids.items()}
    for place, request_id in req_id_map.items():
        row = row_of.get(request_id, place)
        if row in context._closed:
            continue
        result = message if ret is None or ret[place] is None else ret[place]
        try:
            body = encode(result)
        except BatchFailure:
            body = None
        if body is None:
            raise PredictionException(UNSUPPORTED_OUTPUT, 503)
        answer = row_answer(context.request_processor[place], body)
        whole = status_of(code)
        if answer.error or whole is None:
            raise PredictionException(INVALID_RESPONSE, 500)
        status = answer.status if whole == 200 else whole
        headers = [*answer.headers, (STREAM_NEXT, "true")]
        try:
            sent = context.cl_socket(row, status, answer.phrase, headers, bytes(body))
        except StreamClosed:
            # One client that hangs up is no reason to stop for the others of its batch.
            context._closed.add(row)
            if context._closed.issuperset(context.request_ids):
                raise
    return sent


def error_answer(status: int, message: str) -> Answer:
    """Returns an error answer with this text as its message."""
    return Answer(status, "", [], message.encode("utf-8", "replace"), True)


def row_answer(processor: RequestProcessor, body: Body) -> Answer:
    """Returns the answer with the status and headers that the handler set, or the error for broken ones."""
    given = processor.get_response_status_code()
    phrase = processor.get_response_status_phrase()
    phrase = "" if phrase is None else phrase
    status = 200 if given is None else status_of(given)
    if status is None or not _is_value(phrase) or (status in BODYLESS_STATUSES and len(body)):
        log.error("The handler set an invalid status: %.100r %.100r.", given, phrase)
        return error_answer(500, INVALID_RESPONSE)
    headers: Headers = []
    for name, value in processor.get_response_headers().items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name) or not _is_value(value):
            log.error("The handler set an invalid header: %.100r: %.100r.", name, value)
            return error_answer(500, INVALID_RESPONSE)
        if name.lower() not in _FRAMING_HEADERS:
            headers.append((name, value))
    return Answer(status, phrase, headers, body)


def status_of(value: Any) -> int | None:
    """Returns the status of a whole answer as an int, None for what is none.

    It is a whole number, those of `http.HTTPStatus` and numpy included, of three digits, and no 1xx.
    """
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            return None
        value = int(value)
    return value if 200 <= value <= 999 else None


def _is_value(value: Any) -> bool:
    return isinstance(value, str) and _HEADER_VALUE.fullmatch(value) is not None


def encode(result: Any) -> Body | None:
    """Returns a handler's result as bytes; None where this result is to blame (circular, too deep, lone surrogate).

    Raises:
        BatchFailure: a type that JSON has no form for.
    """
    if isinstance(result, (bytes, bytearray)):
        return result
    try:
        if isinstance(result, str):
            return result.encode("utf-8")
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(result, torch.Tensor):
            buffer = io.BytesIO()
            torch.save(result, buffer)
            return buffer.getbuffer()
        return json_text.dumps(result).encode("ascii")
    except TypeError as error:
        log.warning("Unable to serialize model output: %s", error)
        raise BatchFailure(UNSUPPORTED_OUTPUT, f"unable to serialize model output: {error}") from error
    except (ValueError, RecursionError) as error:
        log.warning("Unable to serialize model output: %s", error)
        return None
