"""The bytes between a batcher and one life of a model worker; rules and words are those of `layout`.

Mailbox, made by the batcher::

    header words (see MailWord) | 2 places x (batch word + time of dispatch + `capacity` entries, see `mail_entry`)
    | ring of MAIL_MARKS marks of sequences that the handler has ended

Group board, where the worker spans several processes; made by the batcher, too::

    header words (see GroupWord) | one line of words per rank (see RankWord) | the message
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

from wsgi_ts.batcher.shm.layout import WORD, ModelWord, whole_pages


class MailWord:
    """Header words of a mailbox; the comment names the one writer."""

    ASLEEP: Final = 0  # model worker
    STARTED: Final = 1  # model worker: number of the batch it has begun
    DONE: Final = 2  # model worker: number of the batch it has answered
    START_NS: Final = 3  # model worker: when that batch was begun
    SERVICE_NS: Final = 4  # model worker: how long the last answered batch took
    FINISHED: Final = 5  # model worker: how many requests of its continuous batch have ended
    POSTED: Final = 8  # batcher: number of the last batch put into a place
    REVOKED: Final = 9  # batcher: this batch is not to be begun
    STOP: Final = 10  # batcher: 1 = leave when nothing is posted
    CAPACITY: Final = 11  # batcher: entries per place
    BUSY: Final = 13  # batcher: how many of its model workers had something to do when it posted last
    OUT_OF_MEMORY: Final = 7  # model worker: number of the last batch that it gave back for lack of memory
    ENDED: Final = 6  # model worker: how many sequences its handler has ended; their marks lie behind the places
    ENDED_SEEN: Final = 12  # batcher: how many of those it has read
    KV_CACHE: Final = 14  # model worker: 1 + how full its KV cache is, in parts of KV_CACHE_FULL; 0: nobody tells it


class Tally:
    """What a model worker counts in its mailbox, from MAIL_TALLIES on; its batcher adds it to the board."""

    EXECUTIONS: Final = 0
    HANDLER_ERRORS: Final = 1
    CANCELLED: Final = 2  # not begun: the client had gone
    EXPIRED: Final = 3  # not begun: too late
    LEFT: Final = 4
    LATE: Final = 5
    OTHER: Final = 6


#: The ModelWord that each Tally is added to.
TALLIED: Final = (
    ModelWord.EXECUTIONS,
    ModelWord.HANDLER_ERRORS,
    ModelWord.CANCELLED,
    ModelWord.EXPIRED,
    ModelWord.LEFT,
    ModelWord.LATE,
    ModelWord.OTHER,
)

MAIL_TALLIES: Final = 16
#: How often the worker has counted anything but executions.
MAIL_TALLY_MOVES: Final = MAIL_TALLIES + len(TALLIED)
MAIL_WORDS: Final = 24
#: Batches that may lie in a mailbox, the running one among them.
MAIL_PLACES: Final = 8
#: The low bits of MailWord.REVOKED say how many batches are taken back, the others which is the first.
REVOKED_COUNT_BITS: Final = MAIL_PLACES.bit_length()
#: Words of a place before its entries.
PLACE_WORDS: Final = 2
_MAIL_SEGMENT_SHIFT: Final = 32
_MAIL_SLOT_MASK: Final = (1 << _MAIL_SEGMENT_SHIFT) - 1
#: Sequences whose end a model worker can tell before its batcher has looked; of more it is told later.
MAIL_MARKS: Final = 512


class Progress:
    """How far a model worker has come, as its mailbox says.

    Attributes:
        done: number of the last batch that it has done; of a continuous batch, that it has taken over.
        begun_at: when it began the last batch.
        service_s: how long the last finished batch, or step, took.
        oom: number of the last batch for which its memory was too small.
        marks: those of the sequences that its handler has ended since the last look.
    """

    __slots__ = ("begun_at", "done", "marks", "oom", "service_s")

    def __init__(self, done: int, begun_at: float, service_s: float, oom: int = 0, marks: Sequence[int] = ()) -> None:
        self.done = done
        self.begun_at = begun_at
        self.service_s = service_s
        self.oom = oom
        self.marks = marks


def mail_entry(segment: int, slot: int) -> int:
    """A request as a mailbox, or a group's message, names it.

    The generation is not in it: a slot that was dispatched changes hands again only when its worker has answered it,
    is dead, or has been told not to begin it.
    """
    return segment << _MAIL_SEGMENT_SHIFT | slot


def split_mail_entry(entry: int) -> tuple[int, int]:
    """The numbers of segment and slot that `mail_entry` has put together."""
    return entry >> _MAIL_SEGMENT_SHIFT, entry & _MAIL_SLOT_MASK


def batch_word(count: int, reason: int) -> int:
    """The word before the entries of a batch: how many they are, and why it went (`CloseReason`)."""
    return reason << _MAIL_SEGMENT_SHIFT | count


def split_batch_word(word: int) -> tuple[int, int]:
    """What `batch_word` has put together."""
    return word & _MAIL_SLOT_MASK, word >> _MAIL_SEGMENT_SHIFT


def mailbox_bytes(capacity: int) -> int:
    """Size of a mailbox whose places hold `capacity` entries."""
    return whole_pages((MAIL_WORDS + MAIL_PLACES * (PLACE_WORDS + capacity) + MAIL_MARKS) * WORD)


def is_revoked(word: int, number: int) -> bool:
    """Whether a batch is one of those that MailWord.REVOKED tells of."""
    first = word >> REVOKED_COUNT_BITS
    return first <= number < first + (word & (1 << REVOKED_COUNT_BITS) - 1)


def mark_of(key: str) -> int:
    """A sequence's id as one word, for the way from the model worker to the batcher."""
    return int.from_bytes(blake2b(key.encode("latin-1", "replace"), digest_size=8).digest(), "little")


class GroupWord:
    """Header words of a group board; written by rank 0 but for RANKS."""

    NUMBER: Final = 0  # of the last message
    LENGTH: Final = 1  # of that message, in bytes
    STOP: Final = 2  # 1 = leave
    RANKS: Final = 3  # written by the batcher
    TRACED: Final = 4  # number of the batch under way, where its trace is recorded; else 0
    POSTED_NS: Final = 5  # when that batch was dispatched
    ENDED: Final = 6  # TRACED once rank 0's handler has returned from that batch; else 0


class RankWord:
    """Words of one rank on a group board; written by that rank."""

    ASLEEP: Final = 0
    LOADED: Final = 1  # 0 until its model is loaded, then an HTTP-like status
    DONE: Final = 2  # number of the message it has done its part of
    OUTCOME: Final = 3  # of that part
    PID: Final = 4  # 0 until its process has attached the board


GROUP_WORDS: Final = 8
RANK_WORDS: Final = 8
#: Largest message of a group: slot numbers of a batch, or the shapes of a pipeline's inputs.
GROUP_MESSAGE_BYTES: Final = 65536


def group_bytes(ranks: int) -> int:
    """Size of the board of a group."""
    return (GROUP_WORDS + ranks * RANK_WORDS) * WORD + GROUP_MESSAGE_BYTES
