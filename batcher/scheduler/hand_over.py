"""Batches on their way: posted to a model worker, answered by it, taken back from a slow one, settled for a dead one.

Which batch goes to whom is decided in `dispatch.py`, when it goes in `policy.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from wsgi_ts.batcher.scheduler.dispatch import Batch, ModelQueue, WorkerSeat
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.sources import Sources, end_unbegun
from wsgi_ts.batcher.shm.layout import WORKER_DIED, BatcherWord, MailWord, ModelWord, SlotState
from wsgi_ts.batcher.shm.mailbox import BatcherMailbox

logger = logging.getLogger("wsgi_ts.batcher")

#: How often a request is handed over to workers that end before they begin it; then it is answered with an error.
MOST_HAND_OVERS = 3
#: What a worker that has a batch and does not take it gets on top of its response timeout, in seconds: the batch may
#: have waited behind another one for almost as long.
UNTAKEN_MARGIN_S = 1.0
_GIVEN_UP = f"{WORKER_DIED} {MOST_HAND_OVERS} workers ended before they had read this request: it is not tried again."


class HandOver:
    """The batches that this batcher's model workers have.

    Args:
        sources: the attached segments.
        words: the board's words.
        row: the first word of this batcher's row.
        notify: called with ("kill_worker", worker id, start count).

    Attributes:
        busy: the workers that have batches.
        streaming: those that have a continuous batch under way instead.
    """

    def __init__(
        self, sources: Sources, words: memoryview, row: int, notify: Callable[[tuple[Any, ...]], None]
    ) -> None:
        self.busy: list[WorkerSeat] = []
        self.streaming: list[WorkerSeat] = []
        self._sources = sources
        self._words = words
        self._row = row
        self._notify = notify

    # -- to the worker and back

    def post(self, queue: ModelQueue, seat: WorkerSeat, jobs: list[Job], now: float) -> None:
        """Hands jobs to a worker; those whose client has gone or that are too late are answered instead.

        Args:
            queue: the jobs' model.
            seat: the worker; its mailbox has a free place.
            jobs: the jobs, taken from the queue.
            now: monotonic seconds.
        """
        oldest_ns = queue.oldest_in_time_ns(now)
        batch: list[Job] = []
        entries: list[int] = []
        for place, job in enumerate(jobs):
            if job.deliveries and batch:
                queue.jobs.put_back(jobs[place:])  # it may have ended its worker: it goes alone from now on
                break
            source, slot = job.source, job.slot
            if job.arrived_ns < oldest_ns or source.segment.cancels[slot]:
                end_unbegun(job, oldest_ns, queue.counters)
                if queue.sequences is not None:
                    queue.sequences.ended(job, now)
                continue
            source.in_mailboxes += 1
            batch.append(job)
            entries.append(source.mail_base | slot)
            if job.deliveries:
                queue.jobs.put_back(jobs[place + 1 :])
                break
        if not batch:
            return
        alone = not seat.batches
        if alone:
            (self.streaming if queue.joins_steps else self.busy).append(seat)
        seat.batches.append(Batch(seat.mailbox.post(entries), batch, now, alone))
        queue.counters.handed_over(batch, now)

    def complete(self, queue: ModelQueue, seat: WorkerSeat, now: float) -> None:
        """Takes note of the batches that a worker has finished."""
        words = seat.mailbox.words  # type: ignore[attr-defined]
        done = seat.mailbox.done
        ended_at = (words[MailWord.START_NS] + words[MailWord.SERVICE_NS]) / 1e9
        while seat.batches and seat.batches[0].number <= done:
            batch = seat.batches.pop(0)
            self._sources.leave_mailbox(batch.jobs)
            if queue.sequences is not None:
                for job in batch.jobs:
                    queue.sequences.ended(job, now)
            if batch.revoked:
                self._requeue(queue, self._unbegun(batch))
                continue
            service_s = words[MailWord.SERVICE_NS] / 1e9
            queue.note_service(service_s)
            queue.policy.on_batch(len(batch.jobs), service_s)
            queue.policy.on_answered(min(now, ended_at), len(batch.jobs))
            queue.counters.answered(batch.jobs, min(now, ended_at), service_s)
            if batch.alone and batch.number == done:
                handover_s = words[MailWord.START_NS] / 1e9 - batch.posted_at
                queue.counters.begun(handover_s)
                self._show_last_batch(batch, handover_s, now)
        queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)
        if not seat.batches:
            self.busy.remove(seat)
            seat.idle_since = now

    def note_ended(self, queue: ModelQueue, seat: WorkerSeat, now: float) -> None:
        """Takes note of the requests of a continuous batch that a worker has ended."""
        mailbox: BatcherMailbox = seat.mailbox  # type: ignore[assignment]
        seat.noted = seat.news  # read before the slots: what ends after that is news again
        ended: list[Job] = []
        for batch in tuple(seat.batches):
            under_way: list[Job] = []
            for job in batch.jobs:
                (under_way if job.is_with_worker else ended).append(job)
            batch.jobs = under_way
            if not under_way:
                seat.batches.remove(batch)
        self._sources.leave_mailbox(ended)
        if queue.sequences is not None:
            for job in ended:
                queue.sequences.ended(job, now)
            self._sources.refuse(queue.sequences.end_marked(mailbox.take_ended()))
        if ended:
            seat.idle_since = now
            service_s = mailbox.words[MailWord.SERVICE_NS] / 1e9
            queue.counters.answered(ended, now, service_s)
            queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)
        if not seat.batches:
            self.streaming.remove(seat)

    def _show_last_batch(self, batch: Batch, handover_s: float, now: float) -> None:
        """Puts the times of a finished batch on the board, for the gauges that show the last one."""
        words, row = self._words, self._row
        waited_us = int(batch.posted_at * 1e6) - batch.jobs[0].arrived_ns // 1000
        words[row + BatcherWord.LAST_QUEUE_US] = max(0, waited_us)
        words[row + BatcherWord.LAST_HANDOVER_US] = max(0, int(handover_s * 1e6))
        words[row + BatcherWord.LAST_BATCH_NS] = int(now * 1e9)

    # -- batches that are late

    def watch(self, queue: ModelQueue, now_ns: int, now: float) -> None:
        """Looks for batches that run too long, or are not even taken: over `responseTimeout` their worker is killed."""
        for seat in queue.seats:
            if not seat.batches or seat.killed:
                continue
            words = seat.mailbox.words  # type: ignore[attr-defined]
            started_ns = words[MailWord.START_NS]
            # Of a continuous batch each step has its own time; between two steps there is none.
            if not started_ns or (not queue.joins_steps and seat.mailbox.started <= seat.mailbox.done):
                self._watch_untaken(queue, seat, now)
                continue
            running_s = (now_ns - started_ns) / 1e9
            if running_s > queue.spec.response_timeout_s:
                self._kill(seat)
            elif len(seat.batches) > 1 and running_s > queue.overdue_after() and queue.idle_seat() is not None:
                self._take_back(queue, seat)

    def _watch_untaken(self, queue: ModelQueue, seat: WorkerSeat, now: float) -> None:
        """Looks at a worker that runs nothing: one that does not take what it has been given hangs (or is stopped)."""
        taken = seat.mailbox.started
        posted_at = next((batch.posted_at for batch in seat.batches if batch.number > taken), now)
        # An asynchronous handler may keep its event loop from taking more for as long as it likes.
        limit_s = queue.spec.response_timeout_s + UNTAKEN_MARGIN_S
        if now - posted_at > limit_s and not queue.spec.async_communication:
            self._kill(seat)

    def _kill(self, seat: WorkerSeat) -> None:
        seat.killed = True
        self._notify(("kill_worker", seat.worker_id, seat.start_count))

    def _take_back(self, queue: ModelQueue, seat: WorkerSeat) -> None:
        """Gives the batch that waits behind a slow one to an idle worker instead."""
        batch = seat.batches[-1]
        if batch.revoked:
            return
        batch.revoked = True
        if seat.mailbox.revoke(batch.number):
            # The worker will skip it; its place stays taken until it has said so.
            self._requeue(queue, self._unbegun(batch))
            self._sources.leave_mailbox(batch.jobs)
            batch.jobs = []

    def _unbegun(self, batch: Batch) -> list[Job]:
        """The jobs of a batch that no handler has seen."""
        return [job for job in batch.jobs if job.state == SlotState.CLAIMED and not job.source.retired]

    def _requeue(self, queue: ModelQueue, unbegun: list[Job]) -> None:
        """Puts jobs that no handler has seen back at the head of the queue."""
        # What a sequence's worker knew of it is gone with the worker: there is no other to go on with.
        if queue.accepting and queue.sequences is None:
            queue.jobs.put_back(unbegun)
        else:
            self._sources.refuse(unbegun)

    # -- batches of a worker that is dead

    def settle(self, queue: ModelQueue | None, seat: WorkerSeat, oom: bool, now: float) -> None:
        """Answers what a dead worker had begun and queues again what it had not (README, rule 3).

        Args:
            queue: its model; None when that is gone, too.
            seat: the worker.
            oom: whether it ran out of memory.
            now: monotonic seconds.
        """
        if queue is not None and seat in self.streaming:
            self.note_ended(queue, seat, now)
        for seats in (self.busy, self.streaming):
            if seat in seats:
                seats.remove(seat)
        # What lay behind that batch has nothing to do with the worker's death.
        suspected = seat.mailbox.done + 1
        for batch in reversed(seat.batches):
            self._settle_batch(queue, batch, batch.number <= suspected, oom)
        seat.batches.clear()

    def _settle_batch(self, queue: ModelQueue | None, batch: Batch, suspected: bool, oom: bool) -> None:
        for job in batch.jobs:
            job.source.touched = True  # the worker may have answered and not rung
            if job.state in (SlotState.RUNNING, SlotState.STREAMING):
                job.fail(507 if oom else 500, WORKER_DIED)
                if queue is not None:
                    queue.counters.add(ModelWord.FAILED)
        if queue is not None:
            unbegun = self._unbegun(batch)
            if suspected and queue.sequences is None:
                unbegun = [job for job in unbegun if not self._give_up(queue, job, oom)]
            self._requeue(queue, unbegun)
        self._sources.leave_mailbox(batch.jobs)

    def _give_up(self, queue: ModelQueue, job: Job, oom: bool) -> bool:
        """Answers a job that was handed over often enough to workers that ended before they began it, if it was."""
        job.deliveries += 1
        if job.deliveries < MOST_HAND_OVERS:
            return False
        status = 507 if oom else 500
        logger.error(
            "Model %s %s: request %s is answered %d, since %d workers ended before they had read it",
            queue.spec.name,
            queue.spec.version,
            job.ids[1],
            status,
            MOST_HAND_OVERS,
        )
        job.fail(status, _GIVEN_UP)
        queue.counters.add(ModelWord.FAILED)
        return True
