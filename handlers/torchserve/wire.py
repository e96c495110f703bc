"""TorchServe's frames between server and model worker, for tools and tests that speak to a worker over a socket.

wsgi-ts itself passes requests through shared memory; this is the wire format of contract §8.8. Numbers are 32-bit,
signed and big-endian; texts are preceded by their length in bytes; -1 ends a list.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.inputs import decode_value
from wsgi_ts.handlers.serving.results import encode

logger = logging.getLogger(__name__)

#: Environment variable that, when "false", leaves JSON and text in requests undecoded.
DECODE_VARIABLE = "TS_DECODE_INPUT_REQUEST"
_INT = struct.Struct("!i")
_END = _INT.pack(-1)


class Connection(Protocol):
    """What is needed of a socket."""

    def recv(self, size: int, /) -> bytes:
        """Up to `size` bytes, b"" at the end."""


class Row(NamedTuple):
    """One answer in a frame."""

    request_id: str
    content_type: str
    status: int
    phrase: str
    headers: Mapping[Any, Any]
    body: bytes | bytearray | memoryview


def retrieve_msg(conn: Connection) -> tuple[bytes, Any]:
    """Reads one command.

    Returns:
        `(b"L", {"modelName": …, "modelPath": …, …})`, or `(b"I", [{"requestId": …, "headers": …, "parameters": …}])`.

    Raises:
        ConnectionError: the other side has closed the connection.
        ValueError: neither of the two commands.
    """
    command = _read(conn, 1)
    if command == b"I":
        decode = os.environ.get(DECODE_VARIABLE, "true").lower() == "true"
        requests = []
        while (length := _read_int(conn)) != -1:
            requests.append(_read_request(conn, length, decode))
        return command, requests
    if command == b"L":
        return command, _read_load(conn)
    raise ValueError(f"Invalid command: {command!r}")


def _read_load(conn: Connection) -> dict[str, Any]:
    message: dict[str, Any] = {
        "modelName": _read_text(conn),
        "modelPath": _read_text(conn),
        "batchSize": _read_int(conn),
        "handler": _read_text(conn),
    }
    gpu = _read_int(conn)
    if gpu >= 0:
        message["gpu"] = gpu
    message["envelope"] = _read_text(conn)
    message["limitMaxImagePixels"] = _read(conn, 1) != b"\0"
    return message


def _read_request(conn: Connection, id_length: int, decode: bool) -> dict[str, Any]:
    request_id = _read(conn, id_length)
    headers = []
    while (length := _read_int(conn)) != -1:
        headers.append({"name": _read(conn, length), "value": _read_text(conn)})
    parameters = []
    while (length := _read_int(conn)) != -1:
        name = _read(conn, length).decode("utf-8")
        content_type = _read_text(conn).decode("utf-8")
        value: Any = bytearray(_read_text(conn))
        if decode:
            value = decode_value(content_type, value)
        parameters.append({"name": name, "contentType": content_type, "value": value})
    return {"requestId": request_id, "headers": headers, "parameters": parameters}


def create_load_model_response(code: int, message: str) -> bytes:
    """The frame that answers a load command."""
    return _INT.pack(code) + _text(message) + _END


def create_predict_response(
    ret: list[Any] | None,
    req_id_map: Mapping[int, str],
    message: str,
    code: int,
    context: Context | None = None,
    ts_stream_next: bool = False,
) -> bytes:
    """The frame that answers an inference command.

    Args:
        ret: one result per row; None if all failed.
        req_id_map: row -> request id.
        message: text for the whole batch.
        code: status of the whole batch; of each row, too, where there is no context.
        context: has the status and headers of each row.
        ts_stream_next: marks the rows as chunks that more will follow.

    Raises:
        BatchFailure: a result of a type that JSON has no form for.
    """
    rows = []
    for row, request_id in req_id_map.items():
        headers: dict[Any, Any] = {}
        status, phrase, content_type = code, "", ""
        if context is not None:
            status, phrase = context.get_response_status(row)
            headers = context.get_response_headers(row)
            content_type = context.get_response_content_type(row) or ""
        if ts_stream_next:
            headers["ts_stream_next"] = "true"
        elif headers.get("ts_stream_next") == "true":
            headers["ts_stream_next"] = "false"
        body = b"error" if ret is None else encode(ret[row])
        rows.append(Row(request_id, content_type, status, phrase or "", headers, b"error" if body is None else body))
    return predict_frame(code, message, rows)


def predict_frame(code: int, message: str, rows: Iterable[Row]) -> bytes:
    """The frame with these answers."""
    frame = [_INT.pack(code), _text(message)]
    for row in rows:
        frame += [_text(row.request_id), _text(row.content_type), _INT.pack(row.status), _text(row.phrase)]
        frame += [encode_response_headers(row.headers), _INT.pack(len(row.body)), bytes(row.body)]
    return b"".join([*frame, _END])


def encode_response_headers(resp_hdr_map: Mapping[Any, Any]) -> bytes:
    """Number of headers, then name and value of each."""
    pairs = [_text(str(name)) + _text(str(value)) for name, value in resp_hdr_map.items()]
    return _INT.pack(len(pairs)) + b"".join(pairs)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return _INT.pack(len(raw)) + raw


def _read_text(conn: Connection) -> bytes:
    return _read(conn, _read_int(conn))


def _read_int(conn: Connection) -> int:
    number: int = _INT.unpack(_read(conn, _INT.size))[0]
    return number


def _read(conn: Connection, size: int) -> bytes:
    if size < 0:
        raise ValueError(f"Invalid length in a frame: {size}")
    data = bytearray()
    while len(data) < size:
        piece = conn.recv(size - len(data))
        if not piece:
            raise ConnectionError("the other side has closed the connection")
        data += piece
    return bytes(data)
