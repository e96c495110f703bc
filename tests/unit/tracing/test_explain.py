"""The text of a request's story, from records as they are kept."""

from __future__ import annotations

from typing import Any

import pytest

from wsgi_ts.tracing.explain import _REASONS, explained
from wsgi_ts.tracing.records import CLOSE_REASONS


def span(name: str, start: float, took: float, **attributes: Any) -> dict[str, Any]:
    return {"name": name, "start_ms": start, "duration_ms": took, "attributes": attributes}


TRACE: dict[str, Any] = {
    **{"request_id": "own", "trace_id": None, "model": "m", "version": "2.0", "protocol": "http", "method": "POST"},
    **{"path": "/predictions/m", "status": 200, "error": None, "started": 1_800_000_000.25, "duration_ms": 10.0},
    **{"kept_because": "slow", "batch_size": 3, "batch_close_reason": "delay", "worker": 9000},
    "spans": [
        span("receive", 0.0, 1.0),
        span("queue", 1.0, 3.0),
        span("batch", 4.0, 5.0, **{"batch.number": 7}),
        span("inference", 5.0, 4.0),
        span("respond", 9.0, 1.0),
    ],
}
BATCH: dict[str, Any] = {
    **{"requests": ["a", "own", "b"], "fault": None, "ranks": 0, "worker": 9000, "model": "m", "version": "2.0"}
}


def text(trace: dict[str, Any], batch: dict[str, Any] | None) -> str:
    return "\n".join(explained({"trace": trace, "batch": batch}))


def test_every_reason_is_explained() -> None:
    assert set(_REASONS) == set(CLOSE_REASONS)


def test_it_tells_when_where_and_with_whom() -> None:
    said = text(TRACE, BATCH)
    assert "was answered 200 after 10.000 ms" in said
    assert "Batch 7 of worker 9000: with 2 others; it went because its oldest request had waited" in said
    assert "  with a\n  with b" in said
    assert "raised" not in said


def test_the_bars_stand_where_the_time_went() -> None:
    lines = {line.split()[0]: line for line in text(TRACE, None).splitlines() if "#" in line}
    assert lines["queue"].count("#") == 9
    assert lines["queue"].index("#") - lines["receive"].index("#") == 3
    # A part of a batch stands below it.
    assert lines["inference"].startswith("    inference")


@pytest.mark.parametrize(("size", "said"), [(1, "alone"), (2, "with 1 other;"), (3, "with 2 others;")])
def test_it_counts_the_others(size: int, said: str) -> None:
    assert said in text({**TRACE, "batch_size": size}, None)


def test_of_many_others_some_are_named() -> None:
    said = text({**TRACE, "batch_size": 40}, {**BATCH, "requests": ["own", *(f"r{n}" for n in range(39))]})
    assert said.count("  with r") == 8
    assert "  and 31 more" in said


def test_a_group_and_what_its_handler_raised() -> None:
    said = text({**TRACE, "kept_because": "failed"}, {**BATCH, "ranks": 4, "fault": "ValueError: no"})
    assert "  run by 4 ranks" in said
    assert "  the handler raised ValueError: no" in said
    assert "W-9000-m_2.0" in said


def test_one_that_was_in_no_batch() -> None:
    refused = {**TRACE, "batch_size": None, "error": "Model not found: m", "spans": [span("receive", 0.0, 0.1)]}
    said = text(refused, None)
    assert "  error: Model not found: m" in said
    assert "Batch" not in said
