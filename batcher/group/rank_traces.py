"""What a rank that is not rank 0 tells of its part in batches whose trace is recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wsgi_ts.batcher.worker.batch_traces import gpu_of
from wsgi_ts.messages import SpawnWorker
from wsgi_ts.tracing.batches import RankTold
from wsgi_ts.tracing.post import Post
from wsgi_ts.tracing.records import RANK, batch_key

#: Who has heard nothing more of a batch for so long, in seconds, looks whether that is over: then its part is told.
QUIET_S = 0.2


@dataclass(slots=True)
class _Part:
    """This rank's part in one batch, so far."""

    batch: str
    began_ns: int
    ended_ns: int = 0
    calls: int = 0
    device: str = ""
    fault: str = ""


class RankTraces:
    """Gathers what one rank does for a batch, which under `pp` is told in many messages, and tells it once."""

    def __init__(self, order: SpawnWorker, rank: int, exported_at: str) -> None:
        self._worker_id = order.worker_id
        self._rank = rank
        self._post = Post(exported_at)
        self._part: _Part | None = None

    def is_about(self, number: int, posted_ns: int) -> bool:
        """Whether what is gathered is of this batch (see `begin`)."""
        return self._part is not None and self._part.batch == batch_key(self._worker_id, number, posted_ns)

    @property
    def wait_s(self) -> float:
        """How long may be waited for the next message before `flush` is to be called."""
        return math.inf if self._part is None else QUIET_S

    def begin(self, number: int, posted_ns: int, now_ns: int) -> str:
        """A message has come; returns its batch's key, empty where its trace is not recorded.

        `number` is 0 for a batch whose trace is not recorded; both times are monotonic.
        """
        key = batch_key(self._worker_id, number, posted_ns) if number else ""
        if self._part is not None and self._part.batch != key:
            self.flush()
        if key and self._part is None:
            self._part = _Part(key, now_ns)
        return key

    def end(self, now_ns: int, device: str, fault: str) -> None:
        """This rank has done what the message wants.

        `fault` is what was raised in it, in one line; empty for nothing. `now_ns` is monotonic.
        """
        part = self._part
        if part is not None:
            part.ended_ns, part.device = now_ns, device
            part.calls += 1
            part.fault = part.fault or fault

    def flush(self) -> None:
        """Tells what has been gathered."""
        part, self._part = self._part, None
        if part is not None and part.calls:
            times = part.began_ns, part.ended_ns
            told = RankTold(part.batch, self._rank, part.device, gpu_of(part.device), *times, part.calls, part.fault)
            self._post.send((RANK, told))
        self._post.flush()
