"""The mailbox: how a batcher hands batches to one life of a model worker, and learns that they are done.

Several places, so that the next batches can lie ready while one runs. Batches are numbered from 1; batch n lies in
place n % MAIL_PLACES. A batch counts as given to the handler from the moment the worker stores its number in STARTED;
until then the batcher can take it back (`revoke`). Both sides store their word and then look at the other's, with a
barrier between (Dekker), so a revoked batch is never begun unseen: the worker skips it and stores it as DONE.

A batch that joins a continuous one is DONE as soon as the worker has taken its requests over, and FINISHED counts those
that have ended since.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence

from wsgi_ts.batcher.shm import worker_layout
from wsgi_ts.batcher.shm.doorbell import LONGEST_IDLE_WAIT_S, Doorbell
from wsgi_ts.batcher.shm.group_board import GroupBoard
from wsgi_ts.batcher.shm.layout import KV_CACHE_FULL
from wsgi_ts.batcher.shm.shared_memory import SharedMemory, unlink
from wsgi_ts.batcher.shm.worker_layout import MailWord, Progress, Tally


def mailbox_name(prefix: str, batcher: int, worker_id: int, start_count: int) -> str:
    """Name of the mailbox (and its doorbell) of one life of a model worker."""
    return f"{prefix}-b{batcher}-w{worker_id}-{start_count}"


def worker_of(name: str) -> int:
    """The number of the worker whose mailbox has this name; 0 where it is none of `mailbox_name`."""
    worker = name.rpartition("-")[0].rpartition("-w")[2]
    return int(worker) if worker.isdigit() else 0


class _Mailbox:
    def __init__(self, memory: SharedMemory, capacity: int) -> None:
        self._memory = memory
        self.capacity = capacity
        self._marks = worker_layout.MAIL_WORDS + worker_layout.MAIL_PLACES * (worker_layout.PLACE_WORDS + capacity)
        self.words = memory.words(0, self._marks + worker_layout.MAIL_MARKS)
        self._barrier = threading.Lock()

    def _start(self, number: int) -> int:
        """Index of the first word of the place that a batch lies in."""
        words = worker_layout.PLACE_WORDS + self.capacity
        return worker_layout.MAIL_WORDS + number % worker_layout.MAIL_PLACES * words

    def close(self) -> None:
        """Closes the descriptor."""
        self._memory.close()


class BatcherMailbox(_Mailbox):
    """The batcher's side; it makes the mailbox and removes it, and the board of the worker's ranks if it has any.

    Args:
        name: see `mailbox_name`.
        capacity: requests of a batch at most.
        ranks: processes of the worker; 0 for a worker that is one process.

    Raises:
        SharedMemoryFull: no room; nothing is left behind.
        OSError: this process can open nothing more; nothing is left behind.
    """

    def __init__(self, name: str, capacity: int, ranks: int = 0) -> None:
        size = worker_layout.mailbox_bytes(capacity)
        super().__init__(SharedMemory(name, size, reserve=size, create=True), capacity)
        self.name = name
        self.words[MailWord.CAPACITY] = capacity
        try:
            Doorbell.create(name)
            self.bell = Doorbell(name, self.words, MailWord.ASLEEP)
        except OSError:
            self.close()
            unlink(name)
            Doorbell.unlink(name)
            raise
        self.posted = 0
        self._noted = 0
        self._tallied = [0] * len(worker_layout.TALLIED)
        self._tally_moves = 0
        self._group: GroupBoard | None = None
        self._other_bells: list[Doorbell] = []
        if ranks:
            try:
                self._group = GroupBoard(name, ranks, create=True)
            except OSError:
                self.remove()
                raise
            self._other_bells = [self._group.bell(rank) for rank in range(1, ranks)]

    def post(self, entries: list[int], reason: int = 0, now_ns: int = 0, busy: int = 1) -> int:
        """Posts a batch; returns its number. At most MAIL_PLACES batches may be unfinished.

        `reason` is a `CloseReason`, `now_ns` monotonic; `busy` is how many of the batcher's model workers have
        something to do, this one included.
        """
        number = self.posted + 1
        start = self._start(number)
        words = self.words
        words[start] = worker_layout.batch_word(len(entries), reason)
        words[start + 1] = now_ns
        start += worker_layout.PLACE_WORDS
        if len(entries) == 1:
            words[start] = entries[0]
        else:
            words[start : start + len(entries)] = array("Q", entries)
        words[MailWord.BUSY] = busy
        self.posted = number
        words[MailWord.POSTED] = number
        self.bell.ring()
        for bell in self._other_bells:  # rank 0 will have something for them: they wake up while it does
            bell.ring()
        return number

    @property
    def has_news(self) -> bool:
        """Whether the worker has finished batches, or ended requests or sequences, since the last `read_news`."""
        words = self.words
        return words[MailWord.DONE] + words[MailWord.FINISHED] + words[MailWord.ENDED] != self._noted

    def read_news(self) -> Progress:
        """How far the worker has come. Read the slots after this: what changes later is news again."""
        words = self.words
        seen, ended = words[MailWord.ENDED_SEEN], words[MailWord.ENDED]
        done = words[MailWord.DONE]
        self._noted = done + words[MailWord.FINISHED] + ended
        marks: Sequence[int] = ()
        if seen != ended:
            marks = [words[self._marks + number % worker_layout.MAIL_MARKS] for number in range(seen, ended)]
            words[MailWord.ENDED_SEEN] = ended
        begun_at, service_s = words[MailWord.START_NS] / 1e9, words[MailWord.SERVICE_NS] / 1e9
        return Progress(done, begun_at, service_s, words[MailWord.OUT_OF_MEMORY], marks)

    def take_executions(self) -> int:
        """How often the worker has called its handler since the last call."""
        now = self.words[worker_layout.MAIL_TALLIES + Tally.EXECUTIONS]
        more, self._tallied[Tally.EXECUTIONS] = now - self._tallied[Tally.EXECUTIONS], now
        return more

    def take_tallies(self) -> list[int]:
        """What else the worker has counted since the last call, by Tally; empty where that is nothing."""
        words = self.words
        moves = words[worker_layout.MAIL_TALLY_MOVES]
        if moves == self._tally_moves:
            return []
        self._tally_moves = moves
        now = words[worker_layout.MAIL_TALLIES : worker_layout.MAIL_TALLIES + len(self._tallied)].tolist()
        now[Tally.EXECUTIONS] = self._tallied[Tally.EXECUTIONS]
        before, self._tallied = self._tallied, now
        return [new - old for new, old in zip(now, before, strict=True)]

    def revoke(self, first: int) -> int:
        """Takes back what was posted from batch `first` on.

        All that is taken back stands in one word: the worker could see one of two changed, and the other not.

        Returns:
            The number of the last batch that the worker had begun: those behind it it never will begin.
        """
        count = self.posted - first + 1
        self.words[MailWord.REVOKED] = first << worker_layout.REVOKED_COUNT_BITS | count
        with self._barrier:
            pass
        return self.words[MailWord.STARTED]

    def stop(self) -> None:
        """Asks the worker to leave after what was posted."""
        self.words[MailWord.STOP] = 1
        self.bell.force()

    def remove(self) -> None:
        """Closes the mailbox and unlinks its names."""
        for bell in (self.bell, *self._other_bells):
            bell.close()
        self.close()
        unlink(self.name)
        Doorbell.unlink(self.name)
        if self._group is not None:
            self._group.remove()


class WorkerMailbox(_Mailbox):
    """The model worker's side.

    Attributes:
        posted_ns, reason: of the batch that was begun last: when it was dispatched (monotonic), and why it went.
        worker_id: the worker's number.
    """

    def __init__(self, name: str) -> None:
        memory = SharedMemory(name)
        capacity = memory.words(0, worker_layout.MAIL_WORDS)[MailWord.CAPACITY]
        super().__init__(memory, capacity)
        # Only its batcher rings for a worker, which dies with it.
        self.bell = Doorbell(name, self.words, MailWord.ASLEEP, longest_wait_s=LONGEST_IDLE_WAIT_S)
        self.posted_ns = 0
        self.reason = 0
        self.worker_id = worker_of(name)

    @property
    def stopping(self) -> bool:
        """True once the batcher asked the worker to leave."""
        return bool(self.words[MailWord.STOP])

    def posted(self) -> int:
        """Number of the last batch posted."""
        return self.words[MailWord.POSTED]

    @property
    def busy(self) -> int:
        """How many of the batcher's model workers had something to do when it was posted."""
        return self.words[MailWord.BUSY]

    def begin(self, number: int, now_ns: int) -> list[int] | None:
        """Marks a batch as begun and returns its entries; None when the batcher has taken it back."""
        words = self.words
        words[MailWord.START_NS] = now_ns
        words[MailWord.STARTED] = number
        with self._barrier:
            pass
        if worker_layout.is_revoked(words[MailWord.REVOKED], number):
            return None
        start = self._start(number)
        count, self.reason = worker_layout.split_batch_word(words[start])
        self.posted_ns = words[start + 1]
        start += worker_layout.PLACE_WORDS
        return [words[start]] if count == 1 else words[start : start + count].tolist()

    def count_execution(self) -> None:
        """Counts a call of the handler, for the batcher; say that something is done after this."""
        self.words[worker_layout.MAIL_TALLIES + Tally.EXECUTIONS] += 1

    def count(self, tally: int) -> None:
        """Counts a request that has gone another way than most, one of Tally; say that it is done after this."""
        self.words[worker_layout.MAIL_TALLIES + tally] += 1
        self.words[worker_layout.MAIL_TALLY_MOVES] += 1

    def finish(self, number: int, service_ns: int) -> None:
        """Marks a batch as answered (or skipped)."""
        self.words[MailWord.SERVICE_NS] = service_ns
        self.words[MailWord.DONE] = number

    def show_kv_cache(self, usage: float) -> None:
        """Says how full the worker's KV cache is, from 0 to 1; from any thread. The batcher looks now and then."""
        self.words[MailWord.KV_CACHE] = 1 + round(usage * KV_CACHE_FULL)

    def note_out_of_memory(self) -> None:
        """Says that the batch which was begun last is given back for lack of memory; before `finish`."""
        self.words[MailWord.OUT_OF_MEMORY] = self.words[MailWord.STARTED]

    def take_over(self, number: int) -> list[int]:
        """The entries of a batch whose requests join a continuous batch; its place is free again."""
        entries = self.begin(number, 0)
        self.words[MailWord.DONE] = number
        return [] if entries is None else entries

    def begin_step(self, now_ns: int) -> None:
        """Says since when the handler runs for a step of a continuous batch."""
        self.words[MailWord.START_NS] = now_ns

    def end_step(self, service_ns: int) -> None:
        """Says that the handler has returned."""
        self.words[MailWord.SERVICE_NS] = service_ns
        self.words[MailWord.START_NS] = 0

    def add_finished(self, count: int) -> None:
        """Counts requests of a continuous batch that have ended; their slots say how."""
        self.words[MailWord.FINISHED] += count

    def put_ended(self, marks: list[int]) -> list[int]:
        """Tells of sequences that the handler has ended; returns those for which there is no room yet."""
        words = self.words
        ended = words[MailWord.ENDED]
        room = worker_layout.MAIL_MARKS - (ended - words[MailWord.ENDED_SEEN])
        for number, mark in enumerate(marks[:room], ended):
            words[self._marks + number % worker_layout.MAIL_MARKS] = mark
        words[MailWord.ENDED] = ended + min(room, len(marks))
        return marks[room:]
