"""How much of /dev/shm a configuration takes: what the start makes, what it checks and what the doctor says."""

from __future__ import annotations

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.layout import SegmentLayout
from wsgi_ts.settings.config import Config


def segment_layout(config: Config, batchers: int) -> SegmentLayout:
    """The layout of a segment of a web worker or the gRPC server; `slots_per_worker` becomes a power of two."""
    slots = 1 << (config.slots_per_worker - 1).bit_length()
    return SegmentLayout(slots, batchers, config.max_request_size, config.max_response_size)


def address_bytes(config: Config, batchers: int) -> int:
    """How much of its addresses a batcher gives to all segments: most of them never have memory behind them."""
    return (config.web_workers + 1) * segment_layout(config, batchers).total_bytes


def start_bytes(config: Config, batchers: int) -> int:
    """Bytes of /dev/shm that an instance has taken when it has started; models and large bodies come on top.

    The board, a segment for each web worker and one for the gRPC server, and their doorbells and the batchers'.
    """
    segments = config.web_workers + 1
    board = (layout.board_bytes(batchers) + layout.PAGE - 1) // layout.PAGE * layout.PAGE
    # A doorbell is a semaphore: a file of a few bytes, which takes a page.
    doorbells = (segments + batchers) * layout.PAGE
    return board + segments * segment_layout(config, batchers).reserved_bytes + doorbells
