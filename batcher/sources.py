"""The segments that a batcher has attached, and what of them is in its hands.

`Sources` is where a job (`segment index << 32 | slot`) is looked up and where it is answered if no model worker does.
A segment comes with the web worker that made it and is retired with it; its memory stays attached for as long as a
model worker may still have a slot of it. A batcher that takes the place of a dead one finds jobs in a segment before it
is told of their models: these are the orphans, which wait here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.counters import ModelCounters
from wsgi_ts.batcher.dispatch import Batch, ModelQueue
from wsgi_ts.batcher.job_queue import SEGMENT_SHIFT, SLOT_MASK
from wsgi_ts.batcher.layout import STATE_MASK, WORKER_DIED, ModelWord, SlotState
from wsgi_ts.batcher.ring import RingConsumer
from wsgi_ts.batcher.segment import Segment

logger = logging.getLogger("wsgi_ts.batcher")

#: Status of FAILED slots whose text the web side composes, since it knows how the model was asked for.
NO_WORKER = 503
#: How long a new batcher keeps jobs of models it has not been told of yet.
ADOPTION_S = 5.0
_WITH_WORKER = (SlotState.CLAIMED, SlotState.RUNNING, SlotState.STREAMING)


class Source:
    """One attached segment.

    Attributes:
        segment: the segment.
        ring: its submission ring for this batcher.
        bell: wakes its web worker.
        retired: whether its web worker is dead; then nothing more comes from it.
        in_mailboxes: how many of its slots model workers may still write to.
        touched: whether a slot was answered here since the bell was last rung.
    """

    def __init__(self, segment: Segment, batcher: int, prefix: str) -> None:
        self.segment = segment
        self.ring = RingConsumer(segment, batcher)
        self.bell = segment.bell(prefix)
        self.retired = False
        self.in_mailboxes = 0
        self.touched = False


class Sources:
    """The attached segments of one batcher.

    Args:
        batcher: its number.
        queues: its models' queues by model index; jobs that were found in a segment go there.
        notify: called with ("segment_attached" | "segment_retired", index).

    Attributes:
        attached: the segments by their index.
        suspects: jobs whose worker ended before it began them: their slot's generation, and how often that was so.
    """

    def __init__(
        self, batcher: int, queues: Mapping[int, ModelQueue], notify: Callable[[tuple[Any, ...]], None]
    ) -> None:
        self.attached: dict[int, Source] = {}
        self.suspects: dict[int, tuple[int, int]] = {}
        self._batcher = batcher
        self._queues = queues
        self._notify = notify
        self._orphans: list[tuple[int, int]] = []  # model index and job
        self._adopt_until = time.monotonic() + ADOPTION_S

    # -- segments come and go

    def attach(self, prefix: str, index: int) -> None:
        """Attaches a segment and sorts out what lies in it; one that cannot be attached is logged.

        Args:
            prefix: of the server's names in /dev/shm.
            index: the segment's number.
        """
        if index not in self.attached:
            try:
                segment = Segment.attach(prefix, index)
            except (FileNotFoundError, ValueError) as error:
                logger.error("Segment %d cannot be attached: %s", index, error)
            else:
                source = self.attached[index] = Source(segment, self._batcher, prefix)
                self._adopt(source)
        self._notify(("segment_attached", index))

    def _adopt(self, source: Source) -> None:
        """Sorts out what an earlier batcher left in a segment: claimed jobs are queued again, begun ones fail."""
        now = time.monotonic()
        segment = source.segment
        for slot, word in enumerate(segment.states):
            state = word & STATE_MASK
            if state not in _WITH_WORKER:
                continue
            request = layout.REQUEST.unpack_from(segment.buffer, segment.layout.slot(slot))
            model, batcher, has_sequence = request[2], request[7], request[9] > 0
            if batcher != self._batcher:
                continue
            if state == SlotState.CLAIMED and has_sequence:
                # Its sequence's worker has died with the batcher, and what it knew with it.
                segment.fail(slot, NO_WORKER, "")
                source.touched = True
            elif state == SlotState.CLAIMED:
                self.add_orphan(model, segment.index << SEGMENT_SHIFT | slot)
            else:
                segment.fail(slot, 500, WORKER_DIED)
                source.touched = True
        for queue in self._queues.values():
            self.take_in_orphans(queue, now)

    def retire(self, index: int) -> None:
        """Gives up a segment whose web worker is dead: what is queued is dropped, what runs finishes for nobody."""
        source = self.attached.get(index)
        if source is None:
            self._notify(("segment_retired", index))
            return
        source.retired = True
        # Nobody reads these answers any more: a handler that streams one is told so, as of a client that has gone.
        for slot in range(len(source.segment.cancels)):
            source.segment.cancels[slot] = 1
        self._orphans = [(model, job) for model, job in self._orphans if job >> SEGMENT_SHIFT != index]
        for queue in self._queues.values():
            queue.jobs.drop(lambda job, _: job >> SEGMENT_SHIFT == index)
        if source.in_mailboxes == 0:
            self._drop(source)

    def leave_mailbox(self, jobs: Iterable[int]) -> None:
        """Takes note that no model worker can write to these jobs' slots any more."""
        for job in jobs:
            source = self.attached[job >> SEGMENT_SHIFT]
            source.in_mailboxes -= 1
            if source.retired and source.in_mailboxes == 0:
                self._drop(source)

    def _drop(self, source: Source) -> None:
        index = source.segment.index
        if self.attached.pop(index, None) is not None:
            source.bell.close()
            source.segment.close()
            self._notify(("segment_retired", index))

    @property
    def any_retired(self) -> bool:
        """Whether a retired segment waits for model workers."""
        return any(source.retired for source in self.attached.values())

    # -- jobs whose models are not known yet

    def adopting(self, now: float) -> bool:
        """Whether jobs of unknown models are still kept, because this batcher is new."""
        return now < self._adopt_until

    def add_orphan(self, model: int, job: int) -> None:
        """Keeps a job, whose slot is CLAIMED, until its model is known."""
        self._orphans.append((model, job))

    def take_in_orphans(self, queue: ModelQueue, now: float) -> None:
        """Puts the jobs that were kept for a model at the head of its queue."""
        index = queue.spec.index
        queue.jobs.put_back([job for model, job in self._orphans if model == index], now)
        self._orphans = [(model, job) for model, job in self._orphans if model != index]

    def refuse_orphans(self, now: float) -> None:
        """Answers the jobs whose models have not come in time."""
        if self._orphans and not self.adopting(now):
            self.refuse([job for _, job in self._orphans])
            self._orphans.clear()

    # -- jobs that no model worker answers

    def refuse(self, jobs: Iterable[int]) -> None:
        """Answers jobs for which there is no worker, or none any more."""
        for job in jobs:
            self.fail(job, NO_WORKER, "")

    def end_unbegun(self, job: int, oldest_ns: int, counters: ModelCounters) -> None:
        """Answers a job that is not to be run any more: it is too late, or its client has gone.

        Args:
            job: the job; no worker has begun it.
            oldest_ns: what arrived before this monotonic time is too late.
            counters: its model's, which tell the two apart.
        """
        source = self.attached[job >> SEGMENT_SHIFT]
        slot = job & SLOT_MASK
        # Looked at first: the web worker gives up a request that is too late as it does one whose client has gone.
        if source.segment.arrival_ns(slot) < oldest_ns:
            source.segment.fail_late(slot)
            counters.add(ModelWord.EXPIRED)
        else:
            source.segment.fail_cancelled(slot)
            counters.add(ModelWord.CANCELLED)
        source.touched = True

    def fail(self, job: int, status: int, text: str) -> None:
        """Answers a job with an error."""
        source = self.attached[job >> SEGMENT_SHIFT]
        source.segment.fail(job & SLOT_MASK, status, text)
        source.touched = True

    def ring_touched(self) -> None:
        """Wakes the web workers for which there are answers."""
        for source in self.attached.values():
            if source.touched:
                source.touched = False
                source.bell.ring()

    # -- jobs that may have ended their worker

    def suspect(self, job: int) -> int:
        """Takes note that a worker ended with this job in its hands, unbegun; returns how often that was so by now."""
        generation = self.generation(job)
        known, count = self.suspects.get(job, (generation, 0))
        count = count + 1 if known == generation else 1
        self.suspects[job] = generation, count
        return count

    def is_suspect(self, job: int) -> bool:
        """Whether a worker has ended with this job in its hands, unbegun."""
        noted = self.suspects.get(job)
        return noted is not None and noted[0] == self.generation(job)

    def forget_suspects(self) -> None:
        """Drops the notes of jobs that have been answered by now."""
        for job, (generation, _) in tuple(self.suspects.items()):
            if job >> SEGMENT_SHIFT not in self.attached or self.has_ended(job, generation):
                del self.suspects[job]

    # -- what the slots say

    def is_over(self, job: int, oldest_ns: int) -> bool:
        """Whether a queued job is not to be run any more: its client has gone, or it arrived before `oldest_ns`."""
        segment, slot = self.attached[job >> SEGMENT_SHIFT].segment, job & SLOT_MASK
        return bool(segment.cancels[slot]) or segment.arrival_ns(slot) < oldest_ns

    def state_of(self, job: int, arrived_ns: int) -> int:
        """The SlotState of a job that was handed over; FREE when its slot has the next request, or is gone.

        A worker's answers are seen before it says that its batch is done. When it dies in between, the slots of that
        batch may be with another worker already.

        Args:
            job: the job.
            arrived_ns: when it arrived, which tells it from the requests before and after it in the same slot.
        """
        source = self.attached.get(job >> SEGMENT_SHIFT)
        if source is None:
            return SlotState.FREE
        slot = job & SLOT_MASK
        state = source.segment.states[slot] & STATE_MASK
        return state if source.segment.arrival_ns(slot) == arrived_ns else SlotState.FREE

    def is_answered(self, batch: Batch) -> bool:
        """Whether nobody works on any job of a batch any more, whatever its worker has said so far."""
        return not any(
            self.state_of(job, arrived_ns) in _WITH_WORKER
            for job, arrived_ns in zip(batch.jobs, batch.arrivals_ns, strict=True)
        )

    def generation(self, job: int) -> int:
        """The generation of a job's slot (README, rule 5)."""
        return self.attached[job >> SEGMENT_SHIFT].segment.states[job & SLOT_MASK] >> 8

    def has_ended(self, job: int, generation: int) -> bool:
        """Whether a job that was handed over has its answer; its slot may have the next request by now."""
        word = self.attached[job >> SEGMENT_SHIFT].segment.states[job & SLOT_MASK]
        return word >> 8 != generation or word & STATE_MASK not in _WITH_WORKER

    def ids_of(self, job: int) -> tuple[str, str]:
        """The ids of a job's sequence ("" where its model has none) and of its request."""
        return self.attached[job >> SEGMENT_SHIFT].segment.ids(job & SLOT_MASK)
