"""The bytes of shared memory: every offset, size and word of the server is derived here and nowhere else.

Three kinds of object exist; all words are native 64-bit integers, written with one aligned store.

Board, one per server, made by the supervisor::

    word 0 magic | 1 layout version | 2 epoch of routes.json | 3 ..15 unused
    batcher rows    MAX_BATCHERS x BATCHER_WORDS      asleep, heartbeat (ns), lives
    web rows        MAX_WEB_ROWS x WEB_WORDS          counters of a web worker (one writer: the owner of the segment)
    model rows      MAX_BATCHERS x MAX_MODELS x MODEL_WORDS   counters of a model version on a batcher (writer: it)

Segment, one per producer (a web worker), made by it::

    page 0          header words (see SegmentWord)
    rings           one per batcher: tail line, head line, `slots` entries of two words
    states          `slots` words: generation << 8 | SlotState
    cancels         `slots` words: 1 when the client has gone (writer: the web worker)
    slots           `slots` x SLOT_BYTES: request header, response header, inline request and response data
    payloads        `slots` x (request range + response range), sparse: pages exist only where reserved

Mailbox, one per life of a model worker, made by its batcher::

    header words (see MailWord) | 2 places x (count word + `capacity` entries of segment << 32 | slot)

A segment is valid if and only if word 0 holds MAGIC (written last by its creator) and word 1 the layout version.
Nothing in these objects survives the server: after a crash they are removed, never repaired.

Names of words, states and flags are class constants, not enums: an enum member costs a slow lookup at every use, and
these are used for every request.
"""

from __future__ import annotations

import struct
from typing import Final

MAGIC = 0x7773_6769_2D74_7331
LAYOUT_VERSION = 1
WORD = 8
PAGE = 4096
LINE_WORDS = 8

MAX_BATCHERS = 32
MAX_MODELS = 256
MAX_WEB_ROWS = 64

BATCHER_WORDS = 16
WEB_WORDS = 16
MODEL_WORDS = 64

BOARD_EPOCH = 2
BOARD_BATCHERS = 16
BOARD_WEB = BOARD_BATCHERS + MAX_BATCHERS * BATCHER_WORDS
BOARD_MODELS = BOARD_WEB + MAX_WEB_ROWS * WEB_WORDS
BOARD_BYTES = (BOARD_MODELS + MAX_BATCHERS * MAX_MODELS * MODEL_WORDS) * WORD


class BatcherWord:
    """Words of a batcher's row on the board; written by the batcher alone."""

    ASLEEP: Final = 0
    HEARTBEAT_NS: Final = 1
    LIVES: Final = 2


class News:
    """What a sleeping batcher can want to be woken for; bits of its ASLEEP word."""

    SUBMISSION: Final = 1  # rung by web workers
    COMPLETION: Final = 2  # rung by model workers


class WebWord:
    """Counters of a web worker's row on the board."""

    RESPONSES_2XX: Final = 0
    RESPONSES_4XX: Final = 1
    RESPONSES_5XX: Final = 2


class ModelWord:
    """Words of a model version on the board (one row per batcher); written by that batcher alone.

    READY_WORKERS and OUTSTANDING are gauges that web workers read to choose a device; the rest are counters. From
    BUCKETS on stand the latency histogram's counts, one word per bound of LATENCY_BUCKETS_US and one for +Inf.
    """

    READY_WORKERS: Final = 0
    OUTSTANDING: Final = 1
    QUEUED: Final = 2
    REQUESTS: Final = 3
    LATENCY_US: Final = 4
    QUEUE_US: Final = 5
    BATCHES: Final = 6
    SERVICE_US: Final = 7
    FAILED: Final = 8
    CANCELLED: Final = 9
    EXPIRED: Final = 10
    REFUSED: Final = 11
    BUCKETS: Final = 16


#: Upper bounds, in microseconds, of the histogram of time from accept to answer.
LATENCY_BUCKETS_US = (100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000, 10000000)


class SegmentWord:
    """Header words of a segment, all written by its creator."""

    MAGIC: Final = 0
    VERSION: Final = 1
    OWNER_PID: Final = 2
    SLOTS: Final = 3
    RINGS: Final = 4
    REQUEST_RANGE: Final = 5
    RESPONSE_RANGE: Final = 6
    ASLEEP: Final = 8


class SlotState:
    """Where a slot stands; the low byte of its state word. The comment says who may write the next state."""

    FREE: Final = 0  # web worker
    WRITING: Final = 1  # web worker: head or body still arriving
    SENDING: Final = 2  # web worker: the answer is on its way to the client
    READY: Final = 3  # batcher: in its submission ring
    CLAIMED: Final = 4  # batcher or the model worker it was handed to: in the job queue or in a mailbox
    RUNNING: Final = 5  # model worker; the batcher once that worker is known to be dead
    STREAMING: Final = 6  # as RUNNING, with chunks of the answer to fetch
    DONE: Final = 7  # web worker: the answer is in the slot
    FAILED: Final = 8  # web worker: the slot holds an error's status and text


#: States from here on concern the web worker: one comparison finds the slots it must look at.
FIRST_ANSWERED = SlotState.STREAMING

SLOT_BYTES = PAGE
#: A slot: request header (72 bytes) and inline request data behind it, response header (40) and inline response data
#: behind it, two words for streams at the end. Header and data are contiguous so that one copy writes both.
REQUEST_INLINE = 72
REQUEST_INLINE_BYTES = 2048
RESPONSE_HEADER = REQUEST_INLINE + REQUEST_INLINE_BYTES
RESPONSE_INLINE = RESPONSE_HEADER + 40
STREAM_WORDS = SLOT_BYTES - 2 * WORD
RESPONSE_INLINE_BYTES = STREAM_WORDS - RESPONSE_INLINE
#: A body outside the slot starts here in the request range; a head that is not inline stands before it.
HEAD_ROOM = 16384
#: The part of the response range that carries the chunks of a streamed answer.
STREAM_RING_BYTES = 262144


class RequestFlag:
    """Bits of a request header's flags."""

    EXPLAIN: Final = 1
    DESCRIBE: Final = 2
    BODY_OUTSIDE: Final = 4
    HEAD_OUTSIDE: Final = 8
    #: Query parameters become fields of the handler's row.
    QUERY_ROW: Final = 16
    #: The handler is told the rest of the path as header `url_path`.
    URL_PATH: Final = 32


class ResponseFlag:
    """Bits of a response header's flags."""

    BODY_OUTSIDE: Final = 1
    STREAMED: Final = 2


#: Request header: arrival (ns), body bytes, model index, flags, head bytes, url_path bytes, content-type bytes,
#: batcher, request id (36 ASCII characters).
REQUEST = struct.Struct("<QQIIIHHH36s2x")
#: Response header: start of service (ns), end of service (ns), body bytes, status, flags, phrase bytes, header bytes.
RESPONSE = struct.Struct("<QQQHHII4x")

#: Entry of a submission ring, word 0: slot | model index << 20 | low 32 bits of the generation << 32.
RING_MODEL_SHIFT = 20
RING_GENERATION_SHIFT = 32
RING_SLOT_MASK = (1 << RING_MODEL_SHIFT) - 1
RING_MODEL_MASK = (1 << (RING_GENERATION_SHIFT - RING_MODEL_SHIFT)) - 1
#: Word 1: microseconds since the answer before it on the same connection, NOT_RETURNING for a connection's first.
NOT_RETURNING = (1 << 64) - 1


class MailWord:
    """Header words of a mailbox; the comment names the one writer."""

    ASLEEP: Final = 0  # model worker
    STARTED: Final = 1  # model worker: number of the batch it has begun
    DONE: Final = 2  # model worker: number of the batch it has answered
    START_NS: Final = 3  # model worker: when that batch was begun
    SERVICE_NS: Final = 4  # model worker: how long the last answered batch took
    POSTED: Final = 8  # batcher: number of the last batch put into a place
    REVOKED: Final = 9  # batcher: this batch is not to be begun
    STOP: Final = 10  # batcher: 1 = leave when nothing is posted
    CAPACITY: Final = 11  # batcher: entries per place


MAIL_WORDS = 16
MAIL_PLACES = 2


class SegmentLayout:
    """Offsets and sizes, in bytes, of one segment's parts.

    Args:
        slots: number of slots, a power of two, at most 2**20.
        rings: number of submission rings (batchers).
        max_request_bytes: largest request body.
        max_response_bytes: largest response body.

    Attributes:
        ring_bytes: one submission ring: tail line, head line, two words per slot.
        states: offset of the state words.
        cancels: offset of the cancel words.
        first_slot: offset of slot 0, page-aligned.
        reserved_bytes: what is reserved at start: everything before the payload ranges.
        request_range: address range of a slot's request outside the slot.
        response_range: address range of a slot's response outside the slot.
        payload_stride: from one slot's payload range to the next one's.
        total_bytes: size of the object; most of it never has pages.
    """

    def __init__(self, slots: int, rings: int, max_request_bytes: int, max_response_bytes: int) -> None:
        self.slots = slots
        self.rings = rings
        self.max_request_bytes = max_request_bytes
        self.max_response_bytes = max_response_bytes
        self.ring_bytes = (2 * LINE_WORDS + 2 * slots) * WORD
        self.states = PAGE + rings * self.ring_bytes
        self.cancels = self.states + slots * WORD
        self.first_slot = _round_up(self.cancels + slots * WORD)
        self.reserved_bytes = self.first_slot + slots * SLOT_BYTES
        self.request_range = _round_up(HEAD_ROOM + max_request_bytes)
        self.response_range = _round_up(max(max_response_bytes, STREAM_RING_BYTES))
        self.payload_stride = self.request_range + self.response_range
        self.total_bytes = self.reserved_bytes + slots * self.payload_stride

    def ring(self, batcher: int) -> int:
        """Offset of the submission ring for a batcher."""
        return PAGE + batcher * self.ring_bytes

    def slot(self, index: int) -> int:
        """Offset of a slot."""
        return self.first_slot + index * SLOT_BYTES

    def request_payload(self, index: int) -> int:
        """Offset of a slot's request range."""
        return self.reserved_bytes + index * self.payload_stride

    def response_payload(self, index: int) -> int:
        """Offset of a slot's response range."""
        return self.reserved_bytes + index * self.payload_stride + self.request_range


def mailbox_bytes(capacity: int) -> int:
    """Size of a mailbox whose places hold `capacity` entries."""
    return _round_up((MAIL_WORDS + MAIL_PLACES * (1 + capacity)) * WORD)


def _round_up(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
