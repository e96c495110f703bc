"""Answers with the body, after a time that a batch takes whatever its size: stands for a model on a GPU."""

from __future__ import annotations

import time
from typing import Any

BATCH_S = 0.02


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[bytes] | None:
    """The bodies of a batch."""
    if data is None:
        return None
    time.sleep(BATCH_S)
    return [bytes(row["body"]) for row in data]
