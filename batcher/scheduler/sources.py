"""The segments that a batcher has attached, and the jobs that were found in them before their models were known.

A segment comes with the web worker that made it and is retired with it; its memory stays attached for as long as a
model worker may still have a slot of it. What a dead batcher has left in a segment is found by one scan of its slots'
states. A batcher that takes the place of a dead one does so before it is told of the models: the jobs wait here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from wsgi_ts.batcher.scheduler.counters import ModelCounters
from wsgi_ts.batcher.scheduler.dispatch import ModelQueue
from wsgi_ts.batcher.scheduler.job import Job, job_in
from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.layout import STATE_MASK, WORKER_DIED, ModelWord, SlotState
from wsgi_ts.batcher.shm.ring import RingConsumer, RingDamaged
from wsgi_ts.batcher.shm.segment import Segment

logger = logging.getLogger("wsgi_ts.batcher")

#: Status of FAILED slots whose text the web side composes, since it knows how the model was asked for.
NO_WORKER = 503
#: How long a new batcher keeps jobs of models it has not been told of yet.
ADOPTION_S = 5.0
#: States in which a batcher may have left a slot when it was killed; READY ones it had not even seen.
_LEFT_BEHIND = (SlotState.READY, SlotState.CLAIMED, SlotState.RUNNING, SlotState.STREAMING)


class Source:
    """One attached segment.

    Attributes:
        segment: the segment.
        mail_base: what a mailbox calls slot 0 of it; slot n is `mail_base | n`.
        ring: its submission ring for this batcher; what was submitted before is for a scan to find.
        bell: wakes its web worker.
        retired: whether its web worker is dead; then nothing more comes from it.
        in_mailboxes: how many of its slots model workers may still write to.
        touched: whether a slot was answered here since the bell was last rung.
    """

    def __init__(self, segment: Segment, batcher: int, prefix: str) -> None:
        self.segment = segment
        self.mail_base = layout.mail_entry(segment.index, 0)
        self.ring = RingConsumer(segment, batcher)
        self.bell = segment.bell(prefix)
        self.retired = False
        self.in_mailboxes = 0
        self.touched = False


class _Found(NamedTuple):
    """A job that a scan has found."""

    job: Job
    model: int
    state: int
    has_sequence: bool


class _Orphan(NamedTuple):
    """A job, whose slot is CLAIMED, of a model that is not known yet.

    `accepted` is True where the batcher before this one had let it into its queue.
    """

    job: Job
    model: int
    accepted: bool


class Sources:
    """The attached segments of one batcher.

    Args:
        batcher: its number.
        queues: its models' queues by model index; jobs that were found in a segment go there.
        counters_of: a model's counters by its index.
        notify: called with ("segment_attached" | "segment_retired", index).

    Attributes:
        attached: the segments by their index.
    """

    def __init__(
        self,
        batcher: int,
        queues: Mapping[int, ModelQueue],
        counters_of: Callable[[int], ModelCounters],
        notify: Callable[[tuple[Any, ...]], None],
    ) -> None:
        self.attached: dict[int, Source] = {}
        self._batcher = batcher
        self._queues = queues
        self._counters_of = counters_of
        self._notify = notify
        self._orphans: list[_Orphan] = []
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
                source = Source(Segment.attach(prefix, index), self._batcher, prefix)
            except (FileNotFoundError, ValueError) as error:
                logger.error("Segment %d cannot be attached: %s", index, error)
            else:
                self.attached[index] = source
                self._adopt(source)
        self._notify(("segment_attached", index))

    def _adopt(self, source: Source) -> None:
        """Sorts out what an earlier batcher left in a segment: what no worker has begun is queued, begun ones fail."""
        now = time.monotonic()
        for job, model, state, has_sequence in self._scan(source, now):
            if state == SlotState.READY:
                self.add_orphan(model, job)
            elif state == SlotState.CLAIMED and has_sequence:
                # Its sequence's worker has died with the batcher, and what it knew with it.
                job.fail(NO_WORKER, "")
            elif state == SlotState.CLAIMED:
                self._orphans.append(_Orphan(job, model, accepted=True))
            else:
                job.fail(500, WORKER_DIED)
        self._take_in_all(now)

    def _scan(self, source: Source, now: float) -> Iterator[_Found]:
        """The slots of a segment that an earlier batcher of this number has left behind, in no order.

        The ring's head is where its tail was before the scan. What is published after that and is found READY here
        becomes CLAIMED, and its entry is skipped later; what becomes READY behind the scan's back is published later.
        """
        segment = source.segment
        for slot, word in enumerate(segment.states):
            state = word & STATE_MASK
            if state not in _LEFT_BEHIND:
                continue
            request = layout.REQUEST.unpack_from(segment.buffer, segment.layout.slot(slot))
            if request[7] == self._batcher:
                yield _Found(job_in(source, slot, word, now), request[2], state, request[9] > 0)

    def find_again(self, source: Source, damage: RingDamaged) -> None:
        """Finds by a scan what was submitted, where the ring does not tell any more."""
        logger.error("The ring of segment %d is damaged: %s; a scan finds its requests", source.segment.index, damage)
        source.ring.skip_all()
        now = time.monotonic()
        for job, model, state, _ in self._scan(source, now):
            if state == SlotState.READY:
                self.add_orphan(model, job)
        self._take_in_all(now)

    def _take_in_all(self, now: float) -> None:
        for queue in self._queues.values():
            self.take_in_orphans(queue, now)
        self.refuse_orphans(now)

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
        self._orphans = [orphan for orphan in self._orphans if orphan.job.source is not source]
        for queue in self._queues.values():
            queue.jobs.drop(lambda job: job.source is source)
        if source.in_mailboxes == 0:
            self._drop(source)

    def leave_mailbox(self, jobs: Iterable[Job]) -> None:
        """Takes note that no model worker can write to these jobs' slots any more."""
        for job in jobs:
            source = job.source
            source.in_mailboxes -= 1
            if source.retired and source.in_mailboxes == 0:
                self._drop(self.attached[source.segment.index])

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

    def ring_touched(self) -> None:
        """Wakes the web workers for which there are answers."""
        for source in self.attached.values():
            if source.touched:
                source.touched = False
                source.bell.ring()

    # -- jobs whose models are not known yet

    def adopting(self, now: float) -> bool:
        """Whether jobs of unknown models are still kept, because this batcher is new."""
        return now < self._adopt_until

    def add_orphan(self, model: int, job: Job) -> None:
        """Takes a READY job over and keeps it until its model is known."""
        job.claim()
        self._counters_of(model).add(ModelWord.REQUESTS_NAMED if job.named else ModelWord.REQUESTS)
        self._orphans.append(_Orphan(job, model, accepted=False))

    def take_in_orphans(self, queue: ModelQueue, now: float) -> None:
        """Queues the jobs that were kept for a model, in the order in which they arrived.

        Those that an earlier batcher had let in come first, and are never refused.
        """
        index = queue.spec.index
        mine = sorted((orphan for orphan in self._orphans if orphan.model == index), key=_arrived_ns)
        if not mine:
            return
        self._orphans = [orphan for orphan in self._orphans if orphan.model != index]
        for orphan in mine:
            orphan.job.came_at = now
        queue.jobs.put_back([orphan.job for orphan in mine if orphan.accepted])
        for orphan in mine:
            if not orphan.accepted and not (queue.accepting and queue.jobs.offer(orphan.job)):
                orphan.job.fail(NO_WORKER, "")
                queue.counters.add(ModelWord.REFUSED)

    def refuse_orphans(self, now: float) -> None:
        """Answers the jobs whose models have not come in time."""
        if self._orphans and not self.adopting(now):
            self.refuse(orphan.job for orphan in self._orphans)
            self._orphans.clear()

    # -- jobs that no model worker answers

    def refuse(self, jobs: Iterable[Job]) -> None:
        """Answers jobs for which there is no worker, or none any more."""
        for job in jobs:
            job.fail(NO_WORKER, "")


def end_unbegun(job: Job, oldest_ns: int, counters: ModelCounters) -> None:
    """Answers a job that is not to be run any more: it is too late, or its client has gone.

    Args:
        job: the job; no worker has begun it.
        oldest_ns: what arrived before this monotonic time is too late.
        counters: its model's, which tell the two apart.
    """
    # Looked at first: the web worker gives up a request that is too late as it does one whose client has gone.
    if job.arrived_ns < oldest_ns:
        job.fail_late()
        counters.add(ModelWord.EXPIRED)
    else:
        job.fail_cancelled()
        counters.add(ModelWord.CANCELLED)


def _arrived_ns(orphan: _Orphan) -> int:
    return orphan.job.arrived_ns
