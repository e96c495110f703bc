"""What a client of HTTP/2 is told on a port of HTTP/1.1, by frames."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st
from support.http2 import END, split

from wsgi_ts.http2.frames import PREFACE, ErrorCode, Flag, FrameType, frame, settings_frame
from wsgi_ts.http2.refusal import Refusal

FIELDS = [(":status", "505"), ("content-type", "text/plain")]
BODY = b"not here"
OPENING = PREFACE + settings_frame(())


def head(method: str = "POST", flags: int = Flag.END_HEADERS, *more: tuple[str, str]) -> bytes:
    fields = [(":method", method), (":scheme", "http"), (":path", "/x"), *more]
    return frame(FrameType.HEADERS, flags, 1, Encoder().encode(fields))


def told(data: bytes) -> tuple[Refusal, list[tuple[int, int, int, bytes]]]:
    refusal = Refusal(FIELDS, BODY)
    frames, rest = split(refusal.receive(data))
    assert not rest
    return refusal, [each for each in frames if each[0] not in (FrameType.SETTINGS, FrameType.WINDOW_UPDATE)]


@pytest.mark.parametrize("ends", [False, True])
def test_a_request_is_answered_and_no_other_taken(ends: bool) -> None:
    refusal, frames = told(OPENING + head(flags=END if ends else Flag.END_HEADERS))
    assert refusal.is_over
    (answer, body, *reset, goaway) = frames
    assert answer[:3] == (FrameType.HEADERS, Flag.END_HEADERS, 1)
    assert list(Decoder().decode(answer[3])) == FIELDS
    assert body == (FrameType.DATA, Flag.END_STREAM, 1, BODY)
    assert [each[0] for each in reset] == ([] if ends else [FrameType.RST_STREAM])
    assert goaway[0] == FrameType.GOAWAY
    assert goaway[3][:8] == bytes((0, 0, 0, 1, 0, 0, 0, ErrorCode.NO_ERROR))


def test_a_short_body_that_is_announced_is_waited_for() -> None:
    refusal, frames = told(OPENING + head("POST", Flag.END_HEADERS, ("content-length", "5")))
    assert (frames, refusal.is_over) == ([], False)
    assert refusal.receive(frame(FrameType.DATA, 0, 1, b"hel")) == b""
    sent, _ = split(refusal.receive(frame(FrameType.DATA, Flag.END_STREAM, 1, b"lo")))
    assert refusal.is_over
    assert [each[0] for each in sent] == [FrameType.HEADERS, FrameType.DATA, FrameType.GOAWAY]


@pytest.mark.parametrize(
    "more",
    [
        [("content-length", "65536")],
        [("content-length", "9" * 5000)],
        [("content-length", "5"), ("expect", "100-continue")],
        [("te", "trailers")],
    ],
)
def test_a_body_that_may_take_long_is_not(more: list[tuple[str, str]]) -> None:
    refusal, frames = told(OPENING + head("POST", Flag.END_HEADERS, *more))
    assert refusal.is_over
    assert [each[0] for each in frames] == [
        *(FrameType.HEADERS, FrameType.DATA, FrameType.RST_STREAM, FrameType.GOAWAY),
    ]


@pytest.mark.parametrize("opening", [OPENING, PREFACE + settings_frame([(4, len(BODY) - 1)])])
def test_the_body_is_left_away_where_none_may_come(opening: bytes) -> None:
    """For HEAD, and where the client's window has no room for it."""
    _, frames = told(opening + head("HEAD" if opening == OPENING else "GET", END))
    assert [each[0] for each in frames] == [FrameType.HEADERS, FrameType.GOAWAY]
    assert frames[0][1] == END


@given(cuts=st.lists(st.integers(0, len(OPENING + head())), max_size=6))
def test_in_any_pieces(cuts: list[int]) -> None:
    data = OPENING + head()
    refusal = Refusal(FIELDS, BODY)
    sent = b""
    for start, end in pairwise([0, *sorted(cuts), len(data)]):
        assert not refusal.is_over or start == end
        sent += refusal.receive(data[start:end])
    assert refusal.is_over
    assert sent == Refusal(FIELDS, BODY).receive(data)


@pytest.mark.parametrize("data", [PREFACE[:18] + b"XX\r\n\r\n", PREFACE + head(), OPENING + b"\xff" * 9])
def test_what_is_no_http_2_behind_the_first_line(data: bytes) -> None:
    refusal, frames = told(data)
    assert refusal.is_over
    assert [each[0] for each in frames][-1:] == [FrameType.GOAWAY]
