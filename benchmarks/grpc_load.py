"""Load on TorchServe's gRPC inference API by h2load, the load generator of nghttp2, which takes little of the cores.

It speaks HTTP/2 and knows nothing of gRPC: it sends one message again and again, and counts answers with the status 200
of HTTP, which failed calls have, too. So the bytes of all answers are held to what as many right ones have.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from servers import BenchmarkError

METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
#: The calls under way are shared out among so many connections.
CONNECTIONS = 4


def run(address: str, model: str, body_bytes: int, calls: int, seconds: float) -> dict[str, float]:
    """The figures of one run, with the keys of wrk's (see load.lua).

    Args:
        address: `host:port` of the gRPC API.
        model: the one that is asked; it answers with what it is sent.
        body_bytes: of each request.
        calls: under way at a time.
        seconds: the length of the run.

    Raises:
        BenchmarkError: h2load is missing or gives no figures, or calls have failed.
    """
    if shutil.which("h2load") is None:
        raise BenchmarkError("h2load is missing (Debian, Ubuntu: apt-get install nghttp2-client).")
    with tempfile.TemporaryDirectory() as folder:
        message, log = Path(folder, "message"), Path(folder, "log")
        content = predictions_request(model, bytes(body_bytes))
        message.write_bytes(b"\0" + len(content).to_bytes(4, "big") + content)
        connections = min(CONNECTIONS, calls)
        options = {
            "duration": f"{seconds:g}",
            "clients": connections,
            "max-concurrent-streams": calls // connections,
            "data": message,
            "log-file": log,
        }
        headers = ["--header=content-type: application/grpc", "--header=te: trailers"]
        words = ["h2load", *(f"--{name}={value}" for name, value in options.items()), *headers]
        done = subprocess.run([*words, f"http://{address}{METHOD}"], capture_output=True, text=True, check=False)
        latencies = sorted(int(line.split("\t")[2]) / 1000 for line in log.read_text().splitlines())
    counted = re.search(r"(\d+) done, (\d+) succeeded, (\d+) failed", done.stdout)
    data = re.search(r"traffic: .* (?:\S+) \((\d+)\) data", done.stdout)
    if counted is None or data is None or not latencies:
        raise BenchmarkError(f"h2load gave no figures:\n{done.stdout}{done.stderr}")
    answered, succeeded, failed = map(int, counted.groups())
    # A run ends in the middle of some answers.
    if int(data[1]) < (succeeded - calls) * body_bytes:
        raise BenchmarkError(
            f"{address} answers calls with less than it was sent: {data[1]} bytes for {succeeded} calls"
        )
    return {
        "requests": answered,
        "seconds": seconds,
        "p50_ms": latencies[len(latencies) // 2],
        "p99_ms": latencies[len(latencies) * 99 // 100],
        "max_ms": latencies[-1],
        "refused": failed,
        "broken": 0,
        "timed_out": 0,
    }


def predictions_request(model: str, body: bytes) -> bytes:
    """A PredictionsRequest in protobuf's encoding: model_name (1) and one entry of the map input (3)."""
    entry = _field(1, b"data") + _field(2, body)
    return _field(1, model.encode()) + _field(3, entry)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes: its key, its length as a varint, itself."""
    length, varint = len(content), b""
    while length >= 0x80:
        varint += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content
