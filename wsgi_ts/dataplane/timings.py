"""Where the time of a request went, in a header of its answer: `Server-Timing`, as browsers' tools show it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from wsgi_ts.batcher.shm.request_codec import Times


def timing_value(parts: Iterable[tuple[str, float]]) -> str:
    """Returns the header's value: names, and milliseconds with three digits behind the point."""
    return ", ".join([f"{name};dur={milliseconds:.3f}" for name, milliseconds in parts])


@lru_cache(maxsize=256)
def timing_template(names: tuple[str, ...]) -> str:
    """Returns what gives the header's value of parts with these names by `%` with the milliseconds of each."""
    return ", ".join([name.replace("%", "%%") + ";dur=%.3f" for name in names])


def timings_of(times: Times, submitted_ns: int) -> str:
    """Returns it for a request that a worker has run.

    `submitted_ns` is when it was submitted (monotonic).
    """
    names = ["queue", "handover"]
    values = [max(0, times.posted_ns - submitted_ns) / 1e6, max(0, times.started_ns - times.posted_ns) / 1e6]
    if times.ended_ns:
        names.append("worker")
        values.append((times.ended_ns - times.started_ns) / 1e6)
    for name, begin_ns, end_ns in times.stages():
        names.append(name)
        values.append((end_ns - begin_ns) / 1e6)
    return timing_template(tuple(names)) % tuple(values)
