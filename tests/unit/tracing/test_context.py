"""Trace Context beyond the conformance suite, whose cases are in tests/integration/test_spans.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgi_ts.tracing.context import TraceContext, new_trace, parse, parse_state, with_context

TRACE = "12345678901234567890123456789012"
PARENT = "1234567890123456"
OURS = TraceContext(TRACE, "aaaaaaaaaaaaaaaa", 1, "foo=1")


def test_what_it_says_is_read() -> None:
    assert parse(f"00-{TRACE}-{PARENT}-01".encode(), b"foo=1") == TraceContext(TRACE, PARENT, 1, "foo=1")


def test_unknown_flags_are_not_passed_on() -> None:
    found = parse(f"00-{TRACE}-{PARENT}-ff".encode(), b"")
    assert found is not None
    assert found.flags == 3


@pytest.mark.parametrize("value", [None, b""])
def test_nothing_is_no_context(value: bytes | None) -> None:
    assert parse(value, b"foo=1") is None


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_whatever_is_sent_is_read_without_an_error(parent: bytes, state: bytes) -> None:
    parse(parent, state)
    assert len(parse_state(state)) <= 80


def test_of_a_long_tracestate_long_members_go_first() -> None:
    long = "x=" + "v" * 200
    short = [f"a{n}=1" for n in range(20)]
    kept = parse_state(",".join([*short[:10], long, f"y{long}", f"z{long}", *short[10:]]).encode())
    assert len(kept) <= 512
    assert [member for member in kept.split(",") if len(member) < 128] == short
    assert long in kept


def test_a_new_trace_has_ids_of_its_own() -> None:
    first, second = new_trace(is_sampled=True), new_trace(is_sampled=False)
    assert first.trace_id != second.trace_id
    assert (first.is_sampled, second.is_sampled) == (True, False)
    child = first.child()
    assert (child.trace_id, child.flags) == (first.trace_id, first.flags)
    assert child.span_id != first.span_id


def test_the_head_gets_our_lines_in_place_of_the_client_s() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTraceParent: old\r\nTRACESTATE: old\r\ntracestates: stays\r\nA: b\r\n\r\n"
    assert with_context(head, OURS, has_one=True) == (
        b"POST / HTTP/1.1\r\nHost: x\r\ntracestates: stays\r\nA: b\r\n"
        b"traceparent: 00-12345678901234567890123456789012-aaaaaaaaaaaaaaaa-01\r\ntracestate: foo=1\r\n\r\n"
    )


def test_a_head_without_headers_gets_them_too() -> None:
    made = with_context(b"POST / HTTP/1.0\r\n\r\n", OURS._replace(state=""), has_one=False)
    assert made == b"POST / HTTP/1.0\r\ntraceparent: 00-" + f"{TRACE}-aaaaaaaaaaaaaaaa-01\r\n\r\n".encode()
