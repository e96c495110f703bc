"""TorchServe's frames, byte by byte, and a worker that speaks them over a real socket."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.eventually import eventually

from wsgi_ts.handlers.serving.context import Context, RequestProcessor
from wsgi_ts.handlers.torchserve.socket_worker import TorchModelServiceWorker
from wsgi_ts.handlers.torchserve.wire import (
    create_load_model_response,
    create_predict_response,
    encode_response_headers,
    retrieve_msg,
)

END = b"\xff\xff\xff\xff"

HANDLER = """
import os
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException

def handle(data, context):
    if data is None:
        if os.path.exists(os.path.join(context.system_properties["model_dir"], "too-large")):
            raise MemoryError
        return None
    if "fail" in data[0]:
        raise PredictionException("no", 418)
    if "stream" in data[0]:
        send_intermediate_predict_response(["a"], context.request_ids, "ok", 200, context)
    context.set_response_header(0, "x-rows", str(len(data)))
    return [[row["body"], context.get_request_header(i, "X-Name")] for i, row in enumerate(data)]
"""


def number(value: int) -> bytes:
    return struct.pack("!i", value)


def text(value: bytes) -> bytes:
    return number(len(value)) + value


def load_command(folder: Path, *, gpu: int = -1, envelope: bytes = b"") -> bytes:
    fields = text(b"m") + text(str(folder).encode()) + number(4) + text(b"handler.py")
    return b"L" + fields + number(gpu) + text(envelope) + b"\x01"


def infer_command(*requests: tuple[bytes, bytes, bytes, bytes]) -> bytes:
    frame = b"I"
    for request_id, name, content_type, value in requests:
        frame += text(request_id) + text(b"X-Name") + text(b"n-" + request_id) + END
        frame += text(name) + text(content_type) + text(value) + END
    return frame + END


class Bytes:
    """A connection from which these bytes come, a few at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def recv(self, size: int, /) -> bytes:
        size = min(size, 3)
        piece, self._data = self._data[:size], self._data[size:]
        return piece


def test_a_load_command_is_read(tmp_path: Path) -> None:
    command, message = retrieve_msg(Bytes(load_command(tmp_path, gpu=1, envelope=b"json")))
    assert command == b"L"
    assert message == {
        "modelName": b"m",
        "modelPath": str(tmp_path).encode(),
        "batchSize": 4,
        "handler": b"handler.py",
        "gpu": 1,
        "envelope": b"json",
        "limitMaxImagePixels": True,
    }
    assert "gpu" not in retrieve_msg(Bytes(load_command(tmp_path)))[1]


@pytest.mark.parametrize(
    ("content_type", "raw", "value"),
    [
        (b"application/json", b'{"a": 1}', {"a": 1}),
        (b"application/json", b"{", bytearray(b"{")),
        (b"text/plain", "é".encode(), "é"),
        (b"", b"binary", bytearray(b"binary")),
    ],
)
def test_an_inference_command_is_read(content_type: bytes, raw: bytes, value: Any) -> None:
    command, requests = retrieve_msg(Bytes(infer_command((b"id", b"data", content_type, raw))))
    assert command == b"I"
    assert requests == [
        {
            "requestId": b"id",
            "headers": [{"name": b"X-Name", "value": b"n-id"}],
            "parameters": [{"name": "data", "contentType": content_type.decode(), "value": value}],
        }
    ]


def test_values_stay_encoded_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    _, requests = retrieve_msg(Bytes(infer_command((b"id", b"data", b"application/json", b"1"))))
    assert requests[0]["parameters"][0]["value"] == bytearray(b"1")


def test_what_is_no_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Invalid command: b'U'"):
        retrieve_msg(Bytes(b"U\0\0\0\3"))
    with pytest.raises(ValueError, match="Invalid length"):
        retrieve_msg(Bytes(b"L" + number(-7)))
    with pytest.raises(ConnectionError):
        retrieve_msg(Bytes(load_command(tmp_path)[:-1]))


def test_answers_are_written() -> None:
    assert create_load_model_response(200, "model_loaded") == number(200) + text(b"model_loaded") + END
    begin = number(200) + text(b"success") + text(b"id") + number(0) + number(200) + number(0) + number(0)
    assert create_predict_response(["OK"], {0: "id"}, "success", 200) == begin + text(b"OK") + END
    assert create_predict_response(None, {0: "id"}, "success", 200) == begin + text(b"error") + END
    assert encode_response_headers({"a": "b"}) == number(1) + text(b"a") + text(b"b")


def test_status_and_headers_come_from_the_context() -> None:
    context = Context("m", "", None, 1, None)
    context.set_response_status(201, "Made")
    context.set_response_content_type(0, "text/plain")
    chunk = create_predict_response(["x"], {0: "id"}, "ok", 200, context, ts_stream_next=True)
    last = create_predict_response(["x"], {0: "id"}, "ok", 200, context)
    begin = number(200) + text(b"ok") + text(b"id") + text(b"text/plain") + number(201) + text(b"Made")
    headers = number(2) + text(b"content-type") + text(b"text/plain") + text(b"ts_stream_next")
    assert chunk == begin + headers + text(b"true") + text(b"x") + END
    assert last == begin + headers + text(b"false") + text(b"x") + END


def test_stopping_criteria_say_which_streams_go_on() -> None:
    context = Context("m", "", None, 2, None)
    context.request_processor = [RequestProcessor({}), RequestProcessor({})]
    context.stopping_criteria = {0: lambda _: True, 1: lambda _: False}
    frame = create_predict_response(["a", "b"], {0: "r", 1: "s"}, "ok", 200, context)
    head = number(0) + number(200) + number(0) + number(1) + text(b"ts_stream_next")
    first = text(b"r") + head + text(b"false") + text(b"a")
    second = text(b"s") + head + text(b"true") + text(b"b")
    assert frame == number(200) + text(b"ok") + first + second + END


def test_a_worker_needs_an_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Incomplete data provided"):
        TorchModelServiceWorker()
    with pytest.raises(ValueError, match="socket name"):
        TorchModelServiceWorker("unix")
    with pytest.raises(ValueError, match="port number"):
        TorchModelServiceWorker("tcp")
    with pytest.raises(RuntimeError, match="socket already in use"):
        TorchModelServiceWorker("unix", str(tmp_path))
    with pytest.raises(NotImplementedError):
        TorchModelServiceWorker("tcp", port_num=1, async_comm=True)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    (tmp_path / "handler.py").write_text(HANDLER)
    path = tmp_path / "s"
    module = "wsgi_ts.handlers.torchserve.socket_worker"
    command = [sys.executable, "-m", module, "--sock-type", "unix", "--sock-name", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while "Torch worker started." not in (line := process.stdout.readline()):
            assert line
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(path))
            yield process, connection
        process.wait(120)
        eventually(lambda: not path.exists(), within=20, what="removal of the socket")
    finally:
        process.kill()
        process.communicate()


def read_frame(connection: socket.socket, rows: int) -> list[bytes]:
    """Code and message, then for each row request id, content type, status, phrase, headers and body."""

    def integer() -> int:
        return int(struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))[0])

    def value() -> bytes:
        length = integer()
        return connection.recv(length, socket.MSG_WAITALL) if length else b""

    fields = [str(integer()).encode(), value()]
    for _ in range(rows):
        fields += [value(), value(), str(integer()).encode(), value()]
        fields.append(b",".join(value() + b"=" + value() for _ in range(integer())))
        fields.append(value())
    assert integer() == -1
    return fields


def test_a_worker_serves_over_its_socket(worker: tuple[subprocess.Popen[str], socket.socket], tmp_path: Path) -> None:
    process, connection = worker
    connection.sendall(load_command(tmp_path))
    assert read_frame(connection, 0) == [b"200", b"loaded model m"]
    plain = b"text/plain"
    connection.sendall(infer_command((b"1", b"body", plain, b"a"), (b"2", b"body", plain, b"b")))
    head = [b"200", b"Prediction success"]
    first = [b"1", b"", b"200", b"", b"x-rows=2", b'[\n  "a",\n  "n-1"\n]']
    second = [b"2", b"", b"200", b"", b"", b'[\n  "b",\n  "n-2"\n]']
    assert read_frame(connection, 2) == head + first + second
    connection.sendall(infer_command((b"3", b"fail", plain, b"")))
    assert read_frame(connection, 1) == [b"418", b"no", b"3", b"", b"418", b"", b"", b"error"]
    streamed = text(b"body") + text(plain) + text(b"c") + text(b"stream") + text(b"") + text(b"")
    connection.sendall(b"I" + text(b"4") + END + streamed + END + END)
    assert read_frame(connection, 1)[-2:] == [b"ts_stream_next=true", b"a"]
    assert read_frame(connection, 1)[-1] == b'[\n  "c",\n  null\n]'
    connection.close()
    assert process.wait(120) == 0


def test_a_model_that_does_not_fit_is_answered_507(
    worker: tuple[subprocess.Popen[str], socket.socket], tmp_path: Path
) -> None:
    process, connection = worker
    (tmp_path / "too-large").touch()
    connection.sendall(load_command(tmp_path))
    assert read_frame(connection, 0) == [b"507", b"System out of memory"]
    assert process.wait(120) == 1


def test_without_a_model_and_with_nobody_there_a_worker_ends(tmp_path: Path) -> None:
    worker = TorchModelServiceWorker("unix", str(tmp_path / "s"))
    here, there = socket.socketpair()
    with here, there:
        there.sendall(infer_command((b"1", b"body", b"", b"")))
        with pytest.raises(RuntimeError, match="Received command: b'I', but service is not loaded"):
            worker.handle_connection(here)
        there.close()
        with pytest.raises(SystemExit, match="0"):
            worker.handle_connection(here)
    worker.sock.close()
