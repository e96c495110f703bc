"""W3C Trace Context: what the headers `traceparent` and `tracestate` of a request say, and what takes their place.

A `traceparent` that is invalid, or there more than once, counts as none, and its `tracestate` with it. A `tracestate`
that is invalid is dropped alone. https://www.w3.org/TR/trace-context/, sections 2.2, 2.3 and 4.
"""

from __future__ import annotations

import random
import re
from typing import Final, NamedTuple

#: Version, trace id, parent id and flags; versions after 00 may have more behind them.
_PARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY: Final = rb"[a-z0-9][a-z0-9_\-*/@]{0,255}"
_VALUE: Final = rb"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER: Final = re.compile(rb"%b=%b" % (_KEY, _VALUE))
_MOST_MEMBERS: Final = 32
#: How much of a tracestate is passed on at least; of longer ones the last members are dropped, long ones first.
_KEPT_BYTES: Final = 512
_LONG_MEMBER: Final = 128
_LINES: Final = re.compile(rb"(?i)\r\n(?:traceparent|tracestate):[^\r]*")
_NO_TRACE: Final = b"0" * 32
_NO_SPAN: Final = b"0" * 16
SAMPLED: Final = 1
#: The trace id is random (level 2 of the recommendation); passed on as it is, and true of those made here.
RANDOM_ID: Final = 2


class TraceContext(NamedTuple):
    """A place in a trace: what a request came with, or what goes out in its stead.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits: of the client's span in what came, of ours in what goes out.
        flags: SAMPLED, RANDOM_ID.
        state: the value of tracestate, empty for none.
    """

    trace_id: str
    span_id: str
    flags: int
    state: str

    @property
    def is_sampled(self) -> bool:
        """Whether its spans are recorded."""
        return bool(self.flags & SAMPLED)

    def child(self) -> TraceContext:
        """Returns the same trace with a new span."""
        return TraceContext(self.trace_id, new_id(64), self.flags, self.state)


def new_trace(*, is_sampled: bool) -> TraceContext:
    """Returns the first span of a new trace."""
    return TraceContext(new_id(128), new_id(64), RANDOM_ID | (SAMPLED if is_sampled else 0), "")


def new_id(bits: int) -> str:
    """Returns a random id in hexadecimal digits, never 0."""
    return (random.getrandbits(bits) or 1).to_bytes(bits // 8, "big").hex()


def parse(traceparent: bytes | None, tracestate: bytes) -> TraceContext | None:
    """Reads the headers.

    `traceparent` is None or empty where there is none, or more than one; of `tracestate` the values are joined by
    commas.

    Returns:
        What they say; None where a new trace is to begin.
    """
    match = _PARENT.fullmatch(traceparent.strip(b" \t")) if traceparent else None
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    known = int(flags, 16) & (SAMPLED | RANDOM_ID)
    return TraceContext(trace_id.decode(), span_id.decode(), known, parse_state(tracestate) if tracestate else "")


def parse_state(tracestate: bytes) -> str:
    """Returns a tracestate as it is passed on; empty where it is invalid, or says nothing."""
    if not tracestate:
        return ""
    members = [member for part in tracestate.split(b",") if (member := part.strip(b" \t"))]
    if len(members) > _MOST_MEMBERS or not all(_MEMBER.fullmatch(member) for member in members):
        return ""
    names = [member.partition(b"=")[0] for member in members]
    members = [member for place, member in enumerate(members) if names[place] not in names[:place]]
    for longest in (_LONG_MEMBER, 0):
        while len(b",".join(members)) > _KEPT_BYTES:
            long = [place for place, member in enumerate(members) if len(member) > longest]
            if not long or len(members) == 1:
                break
            del members[long[-1]]
    return b",".join(members).decode("ascii")


def header_lines(context: TraceContext) -> bytes:
    """Returns the header lines that say it."""
    trace_id, span_id, flags, state = context
    line = f"traceparent: 00-{trace_id}-{span_id}-{flags:02x}\r\n"
    return (f"{line}tracestate: {state}\r\n" if state else line).encode("ascii")


def with_context(head: bytes, context: TraceContext, *, has_one: bool) -> bytes:
    """Returns a request's head with this context in place of its own.

    `has_one` says whether it has header lines of these names now.
    """
    if has_one:
        head = _LINES.sub(b"", head)
    return b"%b%b\r\n" % (head[:-2], header_lines(context))
