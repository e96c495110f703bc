"""How the ranks of one group speak: rank 0 tells, the others hear, take part, and say how it went.

A group is one model worker that spans several processes (`parallelType` pp, tp or pptp). Rank 0 owns the mailbox and
answers; what the others need of a batch is a message of some bytes: the numbers of its slots, or one step of a
pipeline. Payloads are never in it: every rank maps the same segments.

One message at a time: rank 0 stores it, then its number, and rings; a rank that has done its part stores the number
and an outcome. Every word has one writer. Waits are limited and look at state again, as with every doorbell.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from wsgi_ts.batcher.shm import layout, worker_layout
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.shared_memory import SharedMemory, unlink
from wsgi_ts.batcher.shm.worker_layout import GroupWord, RankWord

#: How long a rank spins for what it waits for, at first and after each ring, before it sleeps (again): ranks
#: of a batch work in lockstep, and the batcher's ring comes a little earlier than rank 0's message.
SPIN_NS = 200_000


class GroupStopped(Exception):
    """Rank 0 has told the others to leave."""


def group_name(mailbox: str) -> str:
    """Name of the group board that belongs to a mailbox."""
    return f"{mailbox}-g"


class GroupBoard:
    """The shared memory of one group, made and removed by its batcher.

    Args:
        mailbox: name of the mailbox of this life of the worker.
        ranks: how many there are; only where the board is made.
        create: make it instead of attaching to it.

    Raises:
        SharedMemoryFull: no room for it.
    """

    def __init__(self, mailbox: str, ranks: int = 0, *, create: bool = False) -> None:
        self.name = group_name(mailbox)
        size = worker_layout.group_bytes(ranks) if create else 0
        self._memory = SharedMemory(self.name, size, reserve=size, create=create)
        if create:
            self._memory.words(0, worker_layout.GROUP_WORDS)[GroupWord.RANKS] = ranks
            for rank in range(ranks):
                Doorbell.create(self._bell_name(rank))
        self.ranks = self._memory.words(0, worker_layout.GROUP_WORDS)[GroupWord.RANKS]
        self.words = self._memory.words(0, worker_layout.GROUP_WORDS + self.ranks * worker_layout.RANK_WORDS)
        start = len(self.words) * layout.WORD
        self.message = self._memory.buffer[start : start + worker_layout.GROUP_MESSAGE_BYTES]

    def row(self, rank: int) -> int:
        """Index of the first word of a rank."""
        return worker_layout.GROUP_WORDS + rank * worker_layout.RANK_WORDS

    def bell(self, rank: int) -> Doorbell:
        """The doorbell of a rank."""
        return Doorbell(self._bell_name(rank), self.words, self.row(rank) + RankWord.ASLEEP)

    def load_statuses(self) -> list[int]:
        """What each rank has said of its loading: 0 nothing yet, else an HTTP-like status."""
        return [self.words[self.row(rank) + RankWord.LOADED] for rank in range(self.ranks)]

    def pids(self) -> list[int]:
        """The process of each rank; 0 for one that has not come yet."""
        return [self.words[self.row(rank) + RankWord.PID] for rank in range(self.ranks)]

    @property
    def stopping(self) -> bool:
        """Whether rank 0 has told the others to leave."""
        return bool(self.words[GroupWord.STOP])

    def remove(self) -> None:
        """Closes the board and unlinks its names."""
        self._memory.close()
        unlink(self.name)
        for rank in range(self.ranks):
            Doorbell.unlink(self._bell_name(rank))

    def _bell_name(self, rank: int) -> str:
        return f"{self.name}{rank}"


class _Member:
    """What both kinds of rank share."""

    def __init__(self, board: GroupBoard, rank: int) -> None:
        self.rank = rank
        self.ranks = board.ranks
        self._board = board
        self._words = board.words
        self._row = board.row(rank)
        self._bell = board.bell(rank)
        self._words[self._row + RankWord.PID] = os.getpid()

    def report_loaded(self, status: int) -> None:
        """Says how loading went: 200, 500 or 507."""
        self._words[self._row + RankWord.LOADED] = status

    def _wait(self, is_over: Callable[[], bool], limit_s: float = math.inf) -> bool:
        """Waits until `is_over`, and says whether it is."""
        return self._bell.wait(is_over, limit_s, spin_ns=SPIN_NS)


class GroupLeader(_Member):
    """Rank 0: tells the others what is to be done."""

    def __init__(self, board: GroupBoard) -> None:
        super().__init__(board, 0)
        self._others = [(board.row(rank), board.bell(rank)) for rank in range(1, board.ranks)]
        self._number = 0

    def tell(self, message: bytes) -> None:
        """Gives the others a message; waits until they are done with the one before.

        It has at most `worker_layout.GROUP_MESSAGE_BYTES`.
        """
        if len(message) > worker_layout.GROUP_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(message)} bytes; a group takes {worker_layout.GROUP_MESSAGE_BYTES}")
        self._wait(self._all_done)
        self._board.message[: len(message)] = message
        self._words[GroupWord.LENGTH] = len(message)
        self._number += 1
        self._words[GroupWord.NUMBER] = self._number
        for _, bell in self._others:
            bell.ring()

    def trace(self, number: int, posted_ns: int) -> None:
        """Says what the next messages belong to, where ranks tell of that.

        `number` is the batch's, 0 for one whose trace is not recorded; `posted_ns` is when it was dispatched
        (monotonic).
        """
        self._words[GroupWord.ENDED] = 0
        self._words[GroupWord.POSTED_NS] = posted_ns
        self._words[GroupWord.TRACED] = number

    def trace_ended(self) -> None:
        """Says that no further message belongs to that batch."""
        self._words[GroupWord.ENDED] = self._words[GroupWord.TRACED]

    def ended(self) -> None:
        """Says that this rank, too, has done its part of the last message."""
        self._words[self._row + RankWord.DONE] = self._number
        for _, bell in self._others:
            bell.ring()

    def outcomes(self, limit_s: float = math.inf) -> list[int] | None:
        """Waits until the others are done with the last message.

        Returns:
            What each of them says of it; None when they were not done in time.
        """
        if not self._wait(self._all_done, limit_s):
            return None
        return [self._words[row + RankWord.OUTCOME] for row, _ in self._others]

    def stop(self) -> None:
        """Tells the others to leave."""
        self._words[GroupWord.STOP] = 1
        for _, bell in self._others:
            bell.force()

    def _all_done(self) -> bool:
        number, words = self._number, self._words
        return all(words[row + RankWord.DONE] == number for row, _ in self._others)


class GroupFollower(_Member):
    """Every other rank: hears what is to be done.

    Attributes:
        follow: what a pipeline does with a message of rank 0; the handler library sets it.
    """

    def __init__(self, board: GroupBoard, rank: int) -> None:
        super().__init__(board, rank)
        self.follow: Callable[[bytes], None] | None = None
        self._leader_row = board.row(0)
        self._leader = board.bell(0)
        self._number = 0

    @property
    def traced(self) -> tuple[int, int]:
        """Number and time of dispatch of the batch that the message heard last belongs to (`GroupLeader.trace`)."""
        return self._words[GroupWord.TRACED], self._words[GroupWord.POSTED_NS]

    @property
    def tells_more(self) -> bool:
        """Whether there may be further messages for the batch of `traced`."""
        return self._words[GroupWord.TRACED] != self._words[GroupWord.ENDED]

    def hear(self, limit_s: float = math.inf) -> bytes | None:
        """Waits for the next message.

        Returns:
            The message; None when there was none in time.

        Raises:
            GroupStopped: there will be none.
        """
        words = self._words
        wanted = self._number + 1
        if not self._wait(lambda: words[GroupWord.NUMBER] >= wanted or bool(words[GroupWord.STOP]), limit_s):
            return None
        if words[GroupWord.NUMBER] < wanted:
            raise GroupStopped
        return bytes(self._board.message[: words[GroupWord.LENGTH]])

    def done(self, outcome: int) -> None:
        """Says that this rank has done its part of the message it heard last.

        `outcome` is 0 when all went well; anything else is compared with the other ranks'.
        """
        self._number += 1
        self._words[self._row + RankWord.OUTCOME] = outcome
        self._words[self._row + RankWord.DONE] = self._number
        self._leader.ring()

    def leader_ends(self, limit_s: float) -> bool:
        """Waits until rank 0 has done its part of the same message; False when it has not in time."""
        return self._wait(lambda: self._words[self._leader_row + RankWord.DONE] >= self._number, limit_s)
