"""Load on TorchServe's gRPC inference API: client processes in Python, each with some calls under way.

    python benchmarks/grpc_load.py ADDRESS MODEL BODY_BYTES CALLS SECONDS    one of the processes

Clients in Python take a good part of the cores from a server on the same machine: the figures are a lower limit of what
it can do.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio

PROCESSES = 2
METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
CALL_LIMIT_S = 60


def run(address: str, model: str, body_bytes: int, calls: int, seconds: float) -> dict[str, float]:
    """The figures of one run, with the keys of wrk's (see load.lua).

    Args:
        address: of the gRPC API.
        model: the one that is asked.
        body_bytes: of each request.
        calls: under way at a time, shared out among the processes.
        seconds: the length of the run.
    """
    words = [
        sys.executable,
        str(Path(__file__)),
        address,
        model,
        str(body_bytes),
        str(calls // PROCESSES),
        str(seconds),
    ]
    clients = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(PROCESSES)]
    found = [json.loads(client.communicate()[0]) for client in clients]
    latencies = sorted(latency for each in found for latency in each["latencies_ms"])
    failed = sum(each["failed"] for each in found)
    return {
        "requests": len(latencies) + failed,
        "seconds": max(each["seconds"] for each in found),
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


def prediction(response: bytes) -> bytes:
    """The field prediction (1) of a PredictionResponse that has nothing else."""
    length, shift, place = 0, 0, 1
    while True:
        length |= (response[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if response[place - 1] < 0x80:
            return response[place : place + length]


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes: its key, its length as a varint, itself."""
    length, varint = len(content), b""
    while length >= 0x80:
        varint += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content


async def _client(address: str, model: str, body_bytes: int, calls: int, seconds: float) -> dict[str, Any]:
    body = bytes(body_bytes)
    request = predictions_request(model, body)
    latencies: list[float] = []
    failed = 0
    async with grpc.aio.insecure_channel(address) as channel:
        predict = channel.unary_unary(METHOD)
        if prediction(await predict(request, timeout=CALL_LIMIT_S)) != body:
            sys.exit(f"{address} answers with something else than what was sent")
        begun = time.monotonic()

        async def ask() -> None:
            nonlocal failed
            while (sent := time.monotonic()) - begun < seconds:
                try:
                    await predict(request, timeout=CALL_LIMIT_S)
                    latencies.append((time.monotonic() - sent) * 1e3)
                except grpc.aio.AioRpcError:
                    failed += 1

        await asyncio.gather(*(ask() for _ in range(calls)))
        return {"latencies_ms": latencies, "failed": failed, "seconds": time.monotonic() - begun}


if __name__ == "__main__":
    where, name, size, under_way, length = sys.argv[1:]
    print(json.dumps(asyncio.run(_client(where, name, int(size), int(under_way), float(length)))))
