"""TorchServe's frames between server and model worker, for tools and tests that speak to a worker over a socket.

wsgi-ts itself passes requests through shared memory. Numbers are 32-bit, signed and big-endian; texts are preceded by
their length in bytes; -1 ends a list. As in TorchServe's `ts/protocol/otf_message_handler.py`.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from wsgi_ts.handlers.serving.context import STREAM_NEXT, Context
from wsgi_ts.handlers.serving.inputs import decode_value
from wsgi_ts.handlers.serving.results import Answer, encode

#: Environment variable that, when "false", leaves JSON and text in requests undecoded.
DECODE_VARIABLE = "TS_DECODE_INPUT_REQUEST"
_INT = struct.Struct("!i")
_END = _INT.pack(-1)


def retrieve_msg(conn: socket.socket) -> tuple[bytes, Any]:
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
        return command, [_read_request(conn, request_id, decode) for request_id in _read_list(conn)]
    if command == b"L":
        return command, _read_load(conn)
    raise ValueError(f"Invalid command: {command!r}")


def _read_load(conn: socket.socket) -> dict[str, Any]:
    message: dict[str, Any] = {
        "modelName": _read_text(conn),
        "modelPath": _read_text(conn),
        "batchSize": _read_int(conn),
        "handler": _read_text(conn),
        "gpu": _read_int(conn),
        "envelope": _read_text(conn),
        "limitMaxImagePixels": _read(conn, 1) != b"\0",
    }
    if message["gpu"] < 0:
        del message["gpu"]
    return message


def _read_request(conn: socket.socket, request_id: bytes, decode: bool) -> dict[str, Any]:
    headers = [{"name": name, "value": _read_text(conn)} for name in _read_list(conn)]
    parameters = []
    for name in _read_list(conn):
        content_type, value = _read_text(conn).decode("utf-8"), bytearray(_read_text(conn))
        decoded = decode_value(content_type, value) if decode else value
        parameters.append({"name": name.decode("utf-8"), "contentType": content_type, "value": decoded})
    return {"requestId": request_id, "headers": headers, "parameters": parameters}


def create_load_model_response(code: int, message: str) -> bytearray:
    """Returns the frame that answers a load command."""
    return predict_frame(code, message, ())


def create_predict_response(
    ret: list[Any] | None,
    req_id_map: Mapping[int, str],
    message: str,
    code: int,
    context: Context | None = None,
    ts_stream_next: bool = False,
) -> bytearray:
    """Returns the frame that answers an inference command.

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
    answers = []
    for row, request_id in req_id_map.items():
        status, phrase = (code, "") if context is None else context.get_response_status(row)
        headers = {} if context is None else context.get_response_headers(row)
        if ts_stream_next:
            headers[STREAM_NEXT] = "true"
        elif context is not None and context.stopping_criteria and ret is not None:
            # Whatever ran the handler may have asked already.
            ends = None if STREAM_NEXT in headers else context.stopping_criteria[row](ret[row])
            if ends is not None:
                headers[STREAM_NEXT] = "false" if ends else "true"
        elif headers.get(STREAM_NEXT) == "true":
            headers[STREAM_NEXT] = "false"
        body = None if ret is None else encode(ret[row])
        answer = Answer(status, phrase or "", list(headers.items()), b"error" if body is None else body)
        answers.append((request_id, answer))
    return predict_frame(code, message, answers)


def predict_frame(code: int, message: str, answers: Iterable[tuple[str, Answer]]) -> bytearray:
    """Returns the frame with status and text of a whole batch, and request id and answer of each row."""
    frame = [_INT.pack(code), _text(message)]
    for request_id, answer in answers:
        content_type = next((value for name, value in answer.headers if name.lower() == "content-type"), "")
        frame += [_text(request_id), _text(content_type), _INT.pack(answer.status), _text(answer.phrase)]
        frame += [encode_response_headers(dict(answer.headers)), _INT.pack(len(answer.body)), bytes(answer.body)]
    return bytearray().join([*frame, _END])


def encode_response_headers(resp_hdr_map: Mapping[Any, Any]) -> bytes:
    """Returns the number of headers, then name and value of each."""
    pairs = [_text(str(name)) + _text(str(value)) for name, value in resp_hdr_map.items()]
    return _INT.pack(len(pairs)) + b"".join(pairs)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return _INT.pack(len(raw)) + raw


def _read_list(conn: socket.socket) -> Iterator[bytes]:
    """Yields the first text of each element; the caller reads what else an element has before it asks for the next."""
    while (length := _read_int(conn)) != -1:
        yield _read(conn, length)


def _read_text(conn: socket.socket) -> bytes:
    return _read(conn, _read_int(conn))


def _read_int(conn: socket.socket) -> int:
    number: int = _INT.unpack(_read(conn, _INT.size))[0]
    return number


def _read(conn: socket.socket, size: int) -> bytes:
    if size < 0:
        raise ValueError(f"Invalid length in a frame: {size}")
    data = bytearray()
    while len(data) < size:
        piece = conn.recv(size - len(data))
        if len(piece) == 0:
            raise ConnectionError("the other side has closed the connection")
        data += piece
    return bytes(data)
