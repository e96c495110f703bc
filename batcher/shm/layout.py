"""The bytes of board and segment: every offset, size and word in them is derived here and nowhere else.

All words of shared memory are native 64-bit integers, written with one aligned store.

Board, one per server, made by the supervisor::

    word 0 magic | 1 layout version | 2 epoch of routes.json | 3 ..15 unused
    batcher rows    MAX_BATCHERS x BATCHER_WORDS      asleep, heartbeat (ns), lives, times of the last batch, sleeps
    web rows        (MAX_WEB_ROWS + 1) x WEB_WORDS    counters of a web worker (one writer: the owner of the segment);
                                                      the last row is the web worker's that has no segment
    workflow rows   MAX_WEB_ROWS x MAX_WORKFLOWS x WORKFLOW_WORDS   counters of a workflow (writer: the web worker)
    refusals        MAX_WEB_ROWS x MAX_MODELS         requests that no batcher has seen (writer: the web worker)
    HTTP rows       (MAX_WEB_ROWS + 1) x HTTP_SERIES x HTTP_WORDS   times of answers (writer: the web worker)
    model rows      batchers x MAX_MODELS x MODEL_WORDS       counters of a model version on a batcher (writer: it);
                                                      each function of a workflow has one, too, of which it counts times

Segment, one per producer (a web worker), made by it::

    page 0          header words (see SegmentWord)
    rings           one per batcher: tail line, 2 x `slots` entries of two words; the tail is the only shared position:
                    a batcher begins behind it, and finds what came before by a scan of the states
    states          `slots` words: generation << 8 | SlotState
    cancels         `slots` words: 1 when the client has gone (writer: the web worker)
    slots           `slots` x SLOT_BYTES: request header, response header, inline request and response data
    payloads        `slots` x (request range + response range + room for an answer's head), sparse: pages exist only
                    where reserved

The mailbox of a model worker, and the board of its group, are in `worker_layout`.

A segment is valid if and only if word 0 holds MAGIC (written last by its creator) and word 1 the layout version.
Nothing in these objects survives the server: after a crash they are removed, never repaired.

Names of words, states and flags are class constants, not enums: an enum member costs a slow lookup at every use, and
these are used for every request.
"""

from __future__ import annotations

import struct
from typing import Final

MAGIC: Final = 0x7773_6769_2D74_7331
LAYOUT_VERSION: Final = 7
WORD: Final = 8
PAGE: Final = 4096
LINE_WORDS: Final = 8

MAX_BATCHERS: Final = 32
MAX_MODELS: Final = 1024
MAX_WEB_ROWS: Final = 64
#: Workflows that are counted; there may be more.
MAX_WORKFLOWS: Final = 32

BATCHER_WORDS: Final = 16
WEB_WORDS: Final = 16
MODEL_WORDS: Final = 144
WORKFLOW_WORDS: Final = 64
#: Combinations of method, route and status that a web worker counts by themselves; of more it counts their sum.
HTTP_SERIES: Final = 48

BOARD_EPOCH: Final = 2
BOARD_TOKEN_EPOCH: Final = 3
BOARD_BATCHERS: Final = 16
BOARD_WEB: Final = BOARD_BATCHERS + MAX_BATCHERS * BATCHER_WORDS
BOARD_WORKFLOWS: Final = BOARD_WEB + (MAX_WEB_ROWS + 1) * WEB_WORDS
BOARD_REFUSALS: Final = BOARD_WORKFLOWS + MAX_WEB_ROWS * MAX_WORKFLOWS * WORKFLOW_WORDS
BOARD_HTTP: Final = BOARD_REFUSALS + MAX_WEB_ROWS * MAX_MODELS

#: Upper bounds, in microseconds, of the histogram of HTTP requests: those that OpenTelemetry advises, and finer ones.
HTTP_BUCKETS_US: Final = (
    *(500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 75_000, 100_000, 250_000, 500_000, 750_000),
    *(1_000_000, 2_500_000, 5_000_000, 7_500_000, 10_000_000),
)


class HttpWord:
    """Words of one series of an HTTP row."""

    KEY: Final = 0  # see `route_names.series_key`; 0: this series and all behind it are unused
    SUM_US: Final = 1  # of all times
    BUCKETS: Final = 2  # their histogram


HTTP_WORDS: Final = HttpWord.BUCKETS + len(HTTP_BUCKETS_US) + 1
BOARD_MODELS: Final = BOARD_HTTP + (MAX_WEB_ROWS + 1) * HTTP_SERIES * HTTP_WORDS


def board_bytes(batchers: int) -> int:
    """Size of the board of a server with so many batchers."""
    return (BOARD_MODELS + batchers * MAX_MODELS * MODEL_WORDS) * WORD


class BatcherWord:
    """Words of a batcher's row on the board; written by the batcher alone."""

    ASLEEP: Final = 0
    HEARTBEAT_NS: Final = 1
    LIVES: Final = 2
    LAST_BATCH_NS: Final = 3  # when the last batch was found finished (monotonic)
    LAST_QUEUE_US: Final = 4  # how long the oldest request of that batch had waited
    LAST_HANDOVER_US: Final = 5  # how long a model worker took to begin it
    SLEEPS: Final = 6  # times it has gone to sleep, with all news read and counted


class News:
    """What a sleeping batcher can want to be woken for; bits of its ASLEEP word."""

    SUBMISSION: Final = 1  # rung by web workers
    COMPLETION: Final = 2  # rung by model workers


class WebWord:
    """Counters of a web worker's row on the board, and two gauges, which the supervisor zeroes when it is dead."""

    RESPONSES_2XX: Final = 0
    RESPONSES_4XX: Final = 1
    RESPONSES_5XX: Final = 2
    SLOTS: Final = 3
    SLOTS_IN_USE: Final = 4


class ModelWord:
    """Words of a model version on the board (one row per batcher); written by that batcher alone.

    READY_WORKERS and OUTSTANDING are gauges that web workers read to choose a device; QUEUED, OLDEST_NS, KV_CACHE,
    KV_CACHE_WORKERS, FIXED_NS and PER_REQUEST_NS are gauges, too; the rest are counters. Those whose name ends in
    _NAMED count the requests that named the model's version, the same words without it those that did not. A word whose
    name ends in BUCKETS is the first of a histogram's counts: one word per bound of TIME_BUCKETS_US (of BATCH_BUCKETS:
    BATCH_SIZES), and one for what lies above; those that end in BY_SIZE have one for each of BATCH_BUCKETS.
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
    REQUESTS_NAMED: Final = 12
    LATENCY_US_NAMED: Final = 13
    QUEUE_US_NAMED: Final = 14
    HANDOVER_US: Final = 15
    LATENCY_BUCKETS: Final = 16
    QUEUE_BUCKETS: Final = 32
    SERVICE_BUCKETS: Final = 48
    HANDOVER_BUCKETS: Final = 64
    BATCH_BUCKETS: Final = 80
    OLDEST_NS: Final = 91  # when the request arrived that waits longest (monotonic); 0 where none waits
    EXECUTIONS: Final = 92  # calls of the handler
    HANDLER_ERRORS: Final = 93  # requests that the handler has answered with an error
    LEFT: Final = 94  # requests whose client has gone while the handler had them
    LATE: Final = 95  # requests whose deadline has passed while the handler had them
    OTHER: Final = 96  # requests that failed in the model worker without the handler
    TIMED_OUT: Final = 97  # requests whose worker was killed, since it had not answered within the response timeout
    HALVED: Final = 98  # batches that failed and were halved
    POLICY: Final = 99  # what becomes of the calls of its batching plugin: one of PolicyState
    KV_CACHE: Final = 100  # how full the KV caches of its workers are: their sum, in parts of KV_CACHE_FULL ...
    KV_CACHE_WORKERS: Final = 101  # ... and how many workers that is of: those whose handlers tell it
    CLOSED: Final = 104  # batches by why they went: a word for each `policy.CloseReason`
    SERVICE_BY_SIZE: Final = 120  # microseconds that handlers took for the batches of each of BATCH_BUCKETS
    REQUESTS_BY_SIZE: Final = 131  # requests in those batches
    FIXED_NS: Final = 142  # what a batch costs, as the batching rule has learnt it: so much ...
    PER_REQUEST_NS: Final = 143  # ... and so much for each request in it; both 0 where it learns nothing


#: What a KV cache in which nothing is free counts as.
KV_CACHE_FULL: Final = 1_000_000


class PolicyState:
    """What ModelWord.POLICY says, to the next life of the batcher, too."""

    RETURNED: Final = 0  # no call is under way
    CALLED: Final = 1  # one is: where a new life finds this, the last one has ended in it
    OFF: Final = 2  # a life has ended in one: the plugin is asked no more


class WorkflowWord:
    """Words of a workflow in a row on the board; written by the process that owns the row's segment alone.

    The first ones count requests by status, in the order of WORKFLOW_CODES; all other statuses count as the last. NODES
    is the first of two words for each of the first WORKFLOW_NODES nodes: how often it has run, and for how long.
    """

    CODES: Final = 0
    LATENCY_US: Final = 8
    RETRIES: Final = 9
    TIMEOUTS: Final = 10
    LATENCY_BUCKETS: Final = 16
    NODES: Final = 32


#: 499: the client has gone.
WORKFLOW_CODES = (200, 400, 408, 413, 499, 503, 507, 500)
WORKFLOW_NODES = (WORKFLOW_WORDS - WorkflowWord.NODES) // 2

#: Upper bounds, in microseconds, of the histograms of times.
TIME_BUCKETS_US: Final = (
    *(50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000),
    *(100_000, 250_000, 500_000, 1_000_000, 10_000_000),
)
#: Upper bounds of the histogram of requests per batch.
BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


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
    SENDING: Final = 2  # web worker: the answer is on its way to the client, or read by the next node of a workflow
    READY: Final = 3  # batcher: in its submission ring, or found by a scan
    CLAIMED: Final = 4  # batcher or the model worker it was handed to: in the job queue or in a mailbox
    AGAIN: Final = 5  # as CLAIMED; a handler has had it in a batch that failed
    RUNNING: Final = 6  # model worker; the batcher once that worker is known to be dead, or has given its batch back
    STREAMING: Final = 7  # as RUNNING, with chunks of the answer to fetch
    DONE: Final = 8  # web worker: the answer is in the slot
    FAILED: Final = 9  # web worker: the slot holds an error's status and text


#: The bits of a state word that hold the state; the slot's generation lies above them.
STATE_MASK: Final = 0xFF
GENERATION_SHIFT: Final = 8
#: States from here on concern the web worker: one comparison finds the slots it must look at.
FIRST_ANSWERED: Final = SlotState.STREAMING

SLOT_BYTES: Final = PAGE
SLOT_WORDS: Final = SLOT_BYTES // WORD
#: A slot: request header (72 bytes) and inline request data behind it, response header (96) and inline response data
#: behind it, two words for streams at the end. Header and data are contiguous so that one copy writes both.
REQUEST_INLINE: Final = 72
REQUEST_INLINE_BYTES: Final = 2048
RESPONSE_HEADER: Final = REQUEST_INLINE + REQUEST_INLINE_BYTES
RESPONSE_INLINE: Final = RESPONSE_HEADER + 96
STREAM_WORDS: Final = SLOT_BYTES - 2 * WORD
RESPONSE_INLINE_BYTES: Final = STREAM_WORDS - RESPONSE_INLINE
#: A body outside the slot starts here in the request range; a head that is not inline stands before it, with the path's
#: rest, the content type and the sequence's id behind it: room for the largest head twice.
HEAD_ROOM: Final = 28672
#: The head of an answer, its phrase and headers, that does not fit into the slot lies behind the response range.
ANSWER_HEAD_ROOM: Final = 65536
#: The part of the response range that carries the chunks of a streamed answer.
STREAM_RING_BYTES: Final = 262144


class RequestFlag:
    """Bits of a request header's flags."""

    EXPLAIN: Final = 1
    DESCRIBE: Final = 2
    BODY_OUTSIDE: Final = 4
    HEAD_OUTSIDE: Final = 8  # with the path's rest and the content type
    #: Query parameters become fields of the handler's row, and the server adds no headers of its own.
    QUERY_ROW: Final = 16
    #: The handler is told the rest of the path as header `url_path`.
    URL_PATH: Final = 32
    #: The path named the model's version; for the metrics, which tell such requests from the others.
    VERSION_NAMED: Final = 64
    #: The body is a list of named values (see `body_codec.pack_fields`), each a key of the handler's row.
    FIELDS: Final = 128
    #: The body says where the values of the handler's row lie in the segment (see `body_codec.pack_reference`).
    REFERENCES: Final = 256
    #: The path's rest is the name of the function that is asked, of a workflow's handler.
    FUNCTION: Final = 512
    #: Its trace is recorded.
    SAMPLED: Final = 1024
    #: From this bit on: the number of the function's row on the board, plus one; 0 for all other requests.
    ROW_SHIFT: Final = 16


class ReferenceKind:
    """What a reference says of a key of the handler's row."""

    VALUE: Final = 0  # its value lies there
    ELEMENT: Final = 1  # the next element of the list that is its value
    NO_ELEMENT: Final = 2  # that element is None
    NO_ELEMENTS: Final = 3  # that list is empty
    REQUEST: Final = 4  # as `key.name` the fields of the request in this slot
    INLINE: Final = 5  # its value stands behind the name
    INLINE_ELEMENT: Final = 6  # and so does the next element of the list that is its value


#: Text of a request whose worker died while it ran; its status is 500, or 507 when the worker ran out of memory.
WORKER_DIED: Final = "Worker died."
#: Text of a request whose client has gone; its status is 499, and nobody reads it.
CLIENT_GONE: Final = "Client closed the connection"
#: Text of a request that was not answered in time; its status is 408.
TOO_LATE: Final = "The request was not answered within the model's clientTimeoutInMills"


class ResponseFlag:
    """Bits of a response header's flags."""

    BODY_OUTSIDE: Final = 1
    STREAMED: Final = 2
    HEAD_OUTSIDE: Final = 4  # phrase and headers
    #: The batcher has refused the request, and the slot's owner says why. (A handler's error may have no text, either.)
    REFUSED: Final = 8


#: Request header: arrival (ns), body bytes, model index, flags, head bytes, url_path bytes, content-type bytes,
#: batcher, request id (36 ASCII characters), bytes of the sequence's id (0: the model has no sequences). Behind it lie
#: head, url_path, content type, sequence's id and body.
REQUEST: Final = struct.Struct("<QQIIIHHH36sH")
#: Response header: start of service (ns), end of service (ns), body bytes, status, flags, phrase bytes, header bytes,
#: and the low 32 bits of the generation that it answers.
RESPONSE: Final = struct.Struct("<QQQHHIII")
#: Behind it, the batch that the request was run in: when it was dispatched (ns), its number in the worker's mailbox,
#: the worker's number, requests in it, CloseReason, and when (monotonic seconds) the handler was called, its
#: preprocess and its inference had ended (0 where it does not tell), and it had returned.
BATCH: Final = struct.Struct("<QQIHHdddd")
#: Stands there for a request that no worker has run.
NO_BATCH: Final = bytes(BATCH.size)

#: Before each field of a body of named values: bytes of its name, bytes of its value.
FIELD: Final = struct.Struct("<II")
#: A reference: bytes of the key that follows it, ReferenceKind, offset in the segment (or slot), bytes of the value.
REFERENCE: Final = struct.Struct("<IIQQ")

#: Entry of a submission ring, word 0: slot | model index << 20 | low 32 bits of the generation << 32.
RING_MODEL_SHIFT: Final = 20
RING_GENERATION_SHIFT: Final = 32
RING_SLOT_MASK: Final = (1 << RING_MODEL_SHIFT) - 1
RING_MODEL_MASK: Final = (1 << (RING_GENERATION_SHIFT - RING_MODEL_SHIFT)) - 1
RING_GENERATION_MASK: Final = (1 << (WORD * 8 - RING_GENERATION_SHIFT)) - 1
#: Word 1: microseconds since the answer before it on the same connection, NOT_RETURNING for a connection's first.
NOT_RETURNING: Final = (1 << 64) - 1


class SegmentLayout:
    """Offsets and sizes, in bytes, of one segment's parts.

    Args:
        slots: number of slots, a power of two, at most 2**20.
        rings: number of submission rings (batchers).

    Attributes:
        ring_entries: entries of a submission ring (see `ring.py` for why so many).
        ring_bytes: one submission ring: tail line, two words per entry.
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
        self.ring_entries = 2 * slots
        self.ring_bytes = (LINE_WORDS + 2 * self.ring_entries) * WORD
        self.states = PAGE + rings * self.ring_bytes
        self.cancels = self.states + slots * WORD
        self.first_slot = whole_pages(self.cancels + slots * WORD)
        self.reserved_bytes = self.first_slot + slots * SLOT_BYTES
        self.request_range = whole_pages(HEAD_ROOM + max_request_bytes)
        self.response_range = whole_pages(max(max_response_bytes, STREAM_RING_BYTES))
        self.payload_stride = self.request_range + self.response_range + ANSWER_HEAD_ROOM
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

    def answer_head(self, index: int) -> int:
        """Offset of the room for the head of a slot's answer."""
        return self.response_payload(index) + self.response_range


def whole_pages(size: int) -> int:
    """So many bytes, rounded up to whole pages."""
    return (size + PAGE - 1) // PAGE * PAGE
