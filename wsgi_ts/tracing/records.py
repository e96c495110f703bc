"""What records are: one JSON object for a request, a batch, a rank's part in one, and how they belong together."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

#: Kinds of records.
REQUEST: Final = "request"
BATCH: Final = "batch"
RANK: Final = "rank"
#: Why a request's record was made.
SLOW: Final = "slow"
FAILED: Final = "failed"
SAMPLED: Final = "sampled"
#: Where a request was when nobody waited for it any more.
QUEUED: Final = "queued"
RUNNING: Final = "running"
#: Those of a handler; of one that does not tell them, all of its call is inference.
STAGES: Final = ("preprocess", "inference", "postprocess")
#: Why a batch went as it was, by the number of the scheduler's `CloseReason`.
CLOSE_REASONS: Final = (
    *("unknown", "full", "delay", "idle", "adaptive", "no_wait", "joined", "sequence", "plugin", "suspect"),
)


def reason_name(reason: int) -> str:
    """Returns the name of a reason; of a number that is none, as damaged memory may hold, "unknown"."""
    return CLOSE_REASONS[reason] if reason < len(CLOSE_REASONS) else CLOSE_REASONS[0]


def batch_key(worker: int, number: int, posted_ns: int) -> str:
    """Returns what tells a batch from all others of an instance.

    `posted_ns` is when it was dispatched (monotonic): a worker's next life counts from 1 again.
    """
    return f"{worker}-{number}-{posted_ns}"


def batch_ids(instance: str, key: str) -> tuple[str, str]:
    """Returns trace id and span id of a batch's span: they follow from the batch, so that all sides know them.

    `instance` tells this instance of the server from others.
    """
    digest = blake2b(f"{instance} {key}".encode(), digest_size=24).hexdigest()
    return digest[:32], digest[32:]
