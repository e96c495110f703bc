"""A body of 8 MB to four ranks: through the slots that all ranks map, and copied to each over a Unix socket.

Ours is the whole server: the time from the request's last byte leaving the client until the last rank's handler has
the body. The other way is a stand-in for TorchServe's transport only: the time from the frame lying complete in the
sender's memory until the last of four processes has its value; one thread for each socket sends the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from archive_server import ArchiveServer, archive
from reports import markdown, say
from servers import WORK, BenchmarkError

from large.frame_rank import encode_request
from large.measuring import FOLDER, Client, Effort, Figures, quantile

RANKS = 4
BODY_BYTES = 8_000_000
MODEL = "payload"
TITLE = f"A body of 8 MB to {RANKS} ranks"
_WARM_UP = 5
_TIME_BYTES = 8


class FrameSender:
    """The stand-in: a sender with one connection to each of the ranks."""

    def __init__(self, connections: list[socket.socket], threads: ThreadPoolExecutor) -> None:
        self._connections = connections
        self._threads = threads

    def send(self, frame: bytes) -> int:
        """Sends a frame to each rank at once; nanoseconds until the last of them had it."""

        def to_rank(connection: socket.socket) -> int:
            connection.sendall(frame)
            answer = connection.recv(_TIME_BYTES, socket.MSG_WAITALL)
            if len(answer) < _TIME_BYTES:
                raise BenchmarkError("a rank of the transport stand-in has ended")
            return int.from_bytes(answer, "big")

        began = time.monotonic_ns()
        return max(self._threads.map(to_rank, self._connections)) - began


@contextlib.contextmanager
def frame_sender() -> Iterator[FrameSender]:
    """A sender and its ranks, each a process; they end with it."""
    path = WORK / "frames.sock"
    path.unlink(missing_ok=True)
    with contextlib.ExitStack() as closing:
        listener = closing.enter_context(socket.socket(socket.AF_UNIX))
        # A path relative to the working directory: the whole one may be too long for a socket.
        listener.bind(os.path.relpath(path))
        closing.callback(path.unlink)
        listener.listen(RANKS)
        listener.settimeout(30)
        command = [sys.executable, str(FOLDER / "frame_rank.py"), os.path.relpath(path)]
        for _ in range(RANKS):
            # A process ends when its connection does; leaving the `with` of the process waits for it.
            closing.enter_context(subprocess.Popen(command))
        connections = [closing.enter_context(listener.accept()[0]) for _ in range(RANKS)]
        yield FrameSender(connections, closing.enter_context(ThreadPoolExecutor(RANKS)))


def make_archives() -> None:
    """The model: a group whose ranks say when they have the body."""
    config = {
        "minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "parallelType": "tp",
        "torchrun": {"nproc-per-node": RANKS, "OMP_NUMBER_THREADS": 1},
    }  # fmt: skip
    archive(MODEL, FOLDER / "arrival_handler.py", config=config)


def measure(server: ArchiveServer, effort: Effort) -> Figures:
    """One round, in microseconds; the two ways take turns, payload by payload."""
    body = os.urandom(BODY_BYTES)
    frame = encode_request(body)
    ours: list[int] = []
    theirs: list[int] = []
    with server.registered(MODEL), frame_sender() as sender:
        client = Client(server)
        for number in range(-_WARM_UP, effort.payloads):
            sent, answer = client.ask(MODEL, body)
            latest, size = map(int, answer.split())
            if size != BODY_BYTES:
                raise BenchmarkError(f"the ranks got {size} bytes instead of {BODY_BYTES}")
            copied = sender.send(frame)
            if number >= 0:
                ours.append(latest - sent)
                theirs.append(copied)
        client.close()
    figures: Figures = {}
    for title, durations in (("slots", ours), ("sockets", theirs)):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            figures[f"{title}_{name}_us"] = quantile(durations, share) / 1e3
    say(f"8 MB to {RANKS} ranks: {figures['slots_p50_us'] / 1e3:.1f} ms through slots, "
        f"{figures['sockets_p50_us'] / 1e3:.1f} ms over sockets (p50)")  # fmt: skip
    return figures


def table(figures: Figures) -> str:
    """The figures of a round, or their medians, in Markdown."""

    def both(title: str) -> str:
        return f"p50 {figures[f'{title}_p50_us'] / 1e3:.1f} ms, p99 {figures[f'{title}_p99_us'] / 1e3:.1f} ms"

    return markdown(
        ("how", "until the last rank has it"),
        ("slots that all ranks map: the whole server", both("slots")),
        (f"a copy over each of {RANKS} Unix sockets: a stand-in, the transport alone", both("sockets")),
    )
