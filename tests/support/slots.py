"""What the slots of a running server are in, read from its shared memory."""

from __future__ import annotations

import re
from collections import Counter

from support.processes import shared_memory
from wsgi_ts.batcher.shm.layout import SlotState
from wsgi_ts.batcher.shm.segment import Segment

_STATES = {value: name for name, value in vars(SlotState).items() if name.isupper()}


def slots_in_use(prefix: str) -> Counter[str]:
    """How many slots of an instance are in each state but FREE, over all its segments."""
    found: Counter[str] = Counter()
    for name in shared_memory(prefix):
        match = re.fullmatch(re.escape(prefix) + r"-s(\d+)", name)
        if match is None:
            continue
        segment = Segment.attach(prefix, int(match[1]))
        found.update(_STATES[word & 0xFF] for word in segment.states if word & 0xFF != SlotState.FREE)
        segment.close()
    return found
