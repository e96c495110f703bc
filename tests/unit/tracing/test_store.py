"""What is kept of records, and how they are found again."""

from __future__ import annotations

import json
from typing import Any

from wsgi_ts.tracing.store import TraceStore


def request(number: int, kept_because: str = "slow", **fields: Any) -> bytes:
    shown = {"version": "1.0", "trace_id": None, "spans": [], "model": "m", "batch_size": 1, **fields}
    record = {"kind": "request", "request_id": f"r{number}", "kept_because": kept_because, "started": float(number)}
    return json.dumps({**record, **shown, "span_id": "for spans only"}).encode()


def batch(key: str, *numbers: int) -> bytes:
    requests = [f"r{number}" for number in numbers]
    return json.dumps({"kind": "batch", "batch": key, "requests": requests, "fault": "why", "ranks": 0}).encode()


def ids(listed: dict[str, Any]) -> list[str]:
    return [each["request_id"] for each in listed["traces"]]


def test_the_newest_come_first_whatever_they_were_kept_for() -> None:
    store = TraceStore()
    for number, why in ((1, "slow"), (3, "failed"), (2, "sampled")):
        store.add(request(number, why))
    assert ids(store.newest()) == ["r3", "r2", "r1"]
    assert ids(store.newest(limit=1)) == ["r3"]
    assert ids(store.newest(status="slow")) == ["r1"]
    assert ids(store.newest(status="else")) == []


def test_a_model_s_own_are_told_apart() -> None:
    store = TraceStore()
    store.add(request(1, model="a"))
    store.add(request(2, model="b"))
    assert ids(store.newest(model="a")) == ["r1"]


def test_what_is_for_spans_is_not_shown() -> None:
    store = TraceStore()
    store.add(request(1))
    [shown] = store.newest()["traces"]
    assert "span_id" not in shown
    assert shown["worker"] is None


def test_a_request_is_found_with_its_batch() -> None:
    store = TraceStore()
    store.add(request(1, batch="9000-2-5"))
    store.add(request(12, batch="9000-2-5"))
    store.add(batch("9000-1-4", 2, 3))
    store.add(batch("9000-2-5", 12, 1))
    found = store.explain("r1")
    assert found is not None
    assert found["trace"]["request_id"] == "r1"
    assert found["batch"]["requests"] == ["r12", "r1"]
    assert store.explain("r") is None
    assert store.find("r12") is not None


def test_one_that_was_in_no_batch() -> None:
    store = TraceStore()
    store.add(request(1))
    assert store.explain("r1") == {"trace": store.find("r1"), "batch": None}


def test_where_the_worker_has_died_its_requests_know_each_other() -> None:
    store = TraceStore()
    for number, key in ((1, "9000-2-5"), (2, "9000-3-6"), (3, "9000-2-5")):
        store.add(request(number, "failed", batch=key, worker=9000))
    found = store.explain("r1")
    assert found is not None
    assert found["batch"]["requests"] == ["r3", "r1"]
    assert found["batch"]["worker"] == 9000


def test_many_failures_do_not_push_out_what_was_slow() -> None:
    store = TraceStore()
    store.add(request(0, "slow"))
    for number in range(1, 2000):
        store.add(request(number, "failed"))
    assert store.find("r0") is not None
    assert store.find("r1") is None
    assert store.find("r1999") is not None


def test_many_refusals_do_not_push_out_what_handlers_failed_at() -> None:
    store = TraceStore()
    store.add(request(0, "failed"))
    for number in range(1, 2000):
        store.add(request(number, "failed", batch_size=None))
    assert store.find("r0") is not None
    assert store.find("r1") is None
    assert len(store.newest(status="failed", limit=5000)["traces"]) == 301


def test_of_functions_that_share_a_worker_s_batch_each_has_its_own() -> None:
    store = TraceStore()
    store.add(request(1, batch="9000-2-5"))
    store.add(batch("9000-2-5", 1))
    store.add(batch("9000-2-5", 2))
    found = store.explain("r1")
    assert found is not None
    assert found["batch"]["requests"] == ["r1"]


def test_large_records_take_no_more_memory() -> None:
    store = TraceStore()
    for number in range(12):
        store.add(request(number, error="x" * 1_000_000))
    assert ids(store.newest()) == ["r11", "r10", "r9", "r8"]


def test_what_is_no_record_is_not_kept() -> None:
    store = TraceStore()
    of_no_kind = b'{"kind": "request", "kept_because": "x"}'
    for junk in (b"", b"{", b"[]", b"[" * 100_000, b'{"kind": "request"}', b'{"kind": "other"}', of_no_kind):
        store.add(junk)
    assert store.newest() == {"traces": []}
