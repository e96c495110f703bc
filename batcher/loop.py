"""The batcher's hot loop: drain the submission rings, form batches, hand them over, learn when they are done.

Owns: job queues, the consumer side of all submission rings, CLAIMED slots, this batcher's words on the board.
Runs in: the batcher, on a thread of its own; the control thread talks to it by `command` and `notices`.
Rules: README.md beside this file. Payload bytes are never touched here.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.board import Board
from wsgi_ts.batcher.counters import ModelCounters
from wsgi_ts.batcher.dispatch import Batch, ModelQueue, WorkerSeat
from wsgi_ts.batcher.job_queue import SEGMENT_SHIFT
from wsgi_ts.batcher.layout import BatcherWord, MailWord, ModelWord, News, SlotState
from wsgi_ts.batcher.mailbox import BatcherMailbox
from wsgi_ts.batcher.ring import RingConsumer
from wsgi_ts.batcher.segment import Segment
from wsgi_ts.batcher.sequences import Sequence
from wsgi_ts.messages import ModelSpec

logger = logging.getLogger("wsgi_ts.batcher")

_SLOT_MASK = (1 << SEGMENT_SHIFT) - 1
_STATE = 0xFF
_CLAIM = SlotState.CLAIMED - SlotState.READY
_WITH_WORKER = (SlotState.CLAIMED, SlotState.RUNNING, SlotState.STREAMING)
WORKER_DIED = "Worker died."
#: Statuses of FAILED slots whose text the web side composes, since it knows how the model was asked for.
NO_WORKER = 503
#: Longest sleep of the loop; also the period of the work that no event announces (deadlines, heartbeat).
TICK_S = 0.25
#: Longest sleep without being woken for submissions: bounds how late a full queue refuses when a short batch hangs.
UNANNOUNCED_S = 0.02
#: How long a version that is unregistered still takes jobs: a web worker may have looked at its routes just before.
LAST_ARRIVALS_S = 0.05
#: Jobs and batches hold no cycles: the collector need not look often.
GC_THRESHOLD = 50_000
#: How long a new batcher keeps jobs of models it has not been told of yet.
ADOPTION_S = 5.0
_NO_SEQUENCES: Mapping[int, Sequence] = {}


class _Source:
    """One attached segment: its ring, and what of it is still in this batcher's hands."""

    def __init__(self, segment: Segment, batcher: int, prefix: str) -> None:
        self.segment = segment
        self.ring = RingConsumer(segment, batcher)
        self.bell = segment.bell(prefix)
        self.retired = False
        self.in_mailboxes = 0
        self.touched = False


class BatcherLoop:
    """State and steps of the loop; `run` is the thread's body.

    Args:
        board: the instance's board.
        index: this batcher's number.
        notify: called with each notice for the control thread, a tuple that starts with its name:
            ("segment_attached" | "segment_retired", index), ("model_unloaded", model index),
            ("worker_released" | "kill_worker", worker id, start count).
    """

    def __init__(self, board: Board, index: int, notify: Callable[[tuple[Any, ...]], None]) -> None:
        self._board = board
        self._index = index
        self._notify = notify
        self._words = board.words
        self._bell = board.batcher_bell(index)
        self._row = board.batcher_row(index)
        self._commands: deque[tuple[Any, ...]] = deque()
        self._sources: dict[int, _Source] = {}
        self._queues: dict[int, ModelQueue] = {}
        self._seats: dict[int, WorkerSeat] = {}
        self._busy: list[WorkerSeat] = []
        self._streaming: list[WorkerSeat] = []  # those with a continuous batch under way
        self._closing: list[ModelQueue] = []
        self._wake_at = 0.0
        self._next_tick = 0.0
        self._running = True
        # Jobs found in the segments before the supervisor has named their models (after the death of a batcher).
        self._orphans: list[tuple[int, int]] = []
        self._adopt_until = time.monotonic() + ADOPTION_S

    def command(self, *command: Any) -> None:
        """Hands a command to the loop, from another thread: the name of a `_on_…` method and its arguments."""
        self._commands.append(command)
        self._bell.force()

    def run(self) -> None:
        """Runs until the command ("stop",)."""
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        while self._running:
            self.turn()
            self._sleep()

    def turn(self) -> bool:
        """One pass over everything that can have happened; True when something had."""
        now = time.monotonic()
        worked = False
        while self._commands:
            name, *arguments = self._commands.popleft()
            getattr(self, f"_on_{name}")(*arguments)
            worked = True
        # Ends before arrivals: a client's next request must not be counted before the answer it follows.
        for seat in tuple(self._busy):
            if seat.batches and seat.mailbox.done >= seat.batches[0].number:
                self._complete(seat, now)
                worked = True
        if self._streaming:
            worked |= self._look_at_streams(now)
        for source in self._sources.values():
            if source.ring.waiting and not source.retired:
                self._drain(source, now)
                worked = True
        self._wake_at = now + TICK_S
        for queue in self._queues.values():
            if len(queue.jobs):
                self._dispatch(queue, now)
        for queue in tuple(self._closing):
            self._close_if_served(queue, now)
        if now >= self._next_tick:
            self._tick(now)
        self._ring_touched()
        return worked

    def _look_at_streams(self, now: float) -> bool:
        """Takes note of what happened in the continuous batches; True when something had."""
        worked = False
        for seat in tuple(self._streaming):
            if seat.news != seat.noted:
                self._note_ended(seat, now)
                worked = True
                if not seat.batches:
                    self._streaming.remove(seat)
                    if seat.leaving:
                        self._release(seat)
        return worked

    def _sleep(self) -> None:
        """Sleeps until there is news; at once over when there is."""
        if self._something_waits():
            return
        wanted = self._wanted_news()
        self._bell.fall_asleep(wanted)
        if not self._something_waits():
            limit = self._wake_at - time.monotonic()
            if not wanted & News.SUBMISSION:
                limit = min(limit, UNANNOUNCED_S)
            self._bell.sleep(max(0.0, limit))
        self._bell.wake_up()

    def _wanted_news(self) -> int:
        """For what to be woken.

        A submission can wait for the end of a batch where all workers are busy with short ones, and an end that no job
        waits for is noticed with the next submission: under load and with a single client alike, one wake in two.
        """
        wanted = 0
        for queue in self._queues.values():
            if len(queue.jobs) or not queue.accepting or any(seat.leaving for seat in queue.seats):
                wanted |= News.COMPLETION
                if queue.service_s > UNANNOUNCED_S or queue.idle_seat() is not None:
                    wanted |= News.SUBMISSION
            else:
                wanted |= News.SUBMISSION
        if any(source.retired for source in self._sources.values()):
            wanted |= News.COMPLETION
        return wanted or News.SUBMISSION | News.COMPLETION

    def _something_waits(self) -> bool:
        return bool(
            self._commands
            or any(source.ring.waiting and not source.retired for source in self._sources.values())
            or any(seat.batches and seat.mailbox.done >= seat.batches[0].number for seat in self._busy)
            or any(seat.news != seat.noted for seat in self._streaming)
        )

    # -- submission rings

    def _drain(self, source: _Source, now: float) -> None:
        segment = source.segment
        states = segment.states
        arrivals: dict[int, list[int]] = {}
        entries = source.ring.pop_all()
        for place in range(0, len(entries), 2):
            entry = entries[place]
            slot = entry & layout.RING_SLOT_MASK
            word = states[slot]
            if word & _STATE != SlotState.READY or (word >> 8) & 0xFFFFFFFF != entry >> layout.RING_GENERATION_SHIFT:
                continue
            model = entry >> layout.RING_MODEL_SHIFT & layout.RING_MODEL_MASK
            queue = self._queues.get(model)
            if queue is None and now < self._adopt_until:
                states[slot] = word + _CLAIM
                self._orphans.append((model, segment.index << SEGMENT_SHIFT | slot))
                self._count_request(segment, slot, model)
                continue
            if queue is None or not queue.accepting or not queue.jobs.offer(segment.index << SEGMENT_SHIFT | slot, now):
                segment.fail(slot, NO_WORKER, "")
                source.touched = True
                self._counters(model).add(ModelWord.REFUSED)
                self._count_request(segment, slot, model)
                continue
            states[slot] = word + _CLAIM
            tally = arrivals.get(model)
            if tally is None:
                tally = arrivals[model] = [0, 0, 0, 0]
            tally[0] += 1
            tally[3] += segment.names_version(slot)
            idle_us = entries[place + 1]
            if idle_us != layout.NOT_RETURNING:
                tally[1] += idle_us
                tally[2] += 1
        source.ring.commit()
        for model, (count, idle_us, returning, named) in arrivals.items():
            queue = self._queues[model]
            queue.policy.on_arrival(now, count, idle_us / 1e6, returning)
            queue.counters.add(ModelWord.REQUESTS, count - named)
            queue.counters.add(ModelWord.REQUESTS_NAMED, named)
            queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)

    def _count_request(self, segment: Segment, slot: int, model: int) -> None:
        """Counts a request that does not go into a queue, at least not yet."""
        word = ModelWord.REQUESTS_NAMED if segment.names_version(slot) else ModelWord.REQUESTS
        self._counters(model).add(word)

    # -- batches

    def _dispatch(self, queue: ModelQueue, now: float) -> None:
        jobs = queue.jobs
        if queue.sequences is not None:
            self._dispatch_sequences(queue, now)
            return
        while len(jobs) and queue.joins_steps:
            place = queue.join()
            if place is None:
                return
            self._post(queue, place[0], jobs.take(place[1]), now)
        while len(jobs):
            seat = queue.idle_seat()
            if seat is None:
                seat = queue.prefetch_seat()
                if seat is None:
                    return
            else:
                wait = queue.policy.decide(now, len(jobs), jobs.oldest_at, queue.batch_size)
                if wait > 0:
                    self._wake_at = min(self._wake_at, now + wait)
                    return
            self._post(queue, seat, jobs.take(queue.batch_size), now)

    def _dispatch_sequences(self, queue: ModelQueue, now: float) -> None:
        taken = queue.take_sequences()
        while taken is not None:
            seat, jobs = taken
            self._post(queue, seat, [job for job, _ in jobs], now, dict(jobs))
            taken = queue.take_sequences()

    def _post(
        self,
        queue: ModelQueue,
        seat: WorkerSeat,
        jobs: list[int],
        now: float,
        sequences: Mapping[int, Sequence] = _NO_SEQUENCES,
    ) -> None:
        """Hands jobs to a worker; those whose client has gone or that are too late are answered instead."""
        sources = self._sources
        oldest_ns = queue.oldest_in_time_ns(now)
        batch = []
        arrivals: list[int] = []
        named: list[int] = []
        for job in jobs:
            source = sources[job >> SEGMENT_SHIFT]
            segment = source.segment
            slot = job & _SLOT_MASK
            arrived_ns = segment.arrival_ns(slot)
            if segment.cancels[slot] or arrived_ns < oldest_ns:
                self._end_unbegun(queue, job, oldest_ns)
                if queue.sequences is not None:
                    queue.sequences.ended(sequences[job], now)
                continue
            source.in_mailboxes += 1
            batch.append(job)
            arrivals.append(arrived_ns)
            if segment.names_version(slot):
                named.append(arrived_ns)
        if not batch:
            return
        alone = not seat.batches
        if alone:
            (self._streaming if queue.joins_steps else self._busy).append(seat)
        generations = [self._generation(job) for job in batch] if queue.joins_steps else []
        seat.batches.append(Batch(seat.mailbox.post(batch), batch, now, arrivals, named, alone))
        seat.batches[-1].generations = generations
        if sequences:
            seat.batches[-1].sequences = [sequences[job] for job in batch]
        queue.counters.handed_over(arrivals, named, now)

    def _complete(self, seat: WorkerSeat, now: float) -> None:
        """Takes note of the batches that a worker has finished."""
        queue = self._queues[seat.model_index]
        words = seat.mailbox.words  # type: ignore[attr-defined]
        done = seat.mailbox.done
        ended_at = (words[MailWord.START_NS] + words[MailWord.SERVICE_NS]) / 1e9
        while seat.batches and seat.batches[0].number <= done:
            batch = seat.batches.pop(0)
            self._leave_mailbox(batch.jobs)
            if queue.sequences is not None:
                for sequence in batch.sequences:
                    queue.sequences.ended(sequence, now)
            if batch.revoked:
                self._requeue_unbegun(queue, batch, now)
                continue
            service_s = words[MailWord.SERVICE_NS] / 1e9
            queue.note_service(service_s)
            queue.policy.on_batch(len(batch.jobs), service_s)
            queue.policy.on_answered(min(now, ended_at), len(batch.jobs))
            queue.counters.answered(batch.arrivals_ns, batch.named_ns, min(now, ended_at), service_s)
            if batch.alone and batch.number == done:
                handover_s = words[MailWord.START_NS] / 1e9 - batch.posted_at
                queue.counters.begun(handover_s)
                self._show_last_batch(batch, handover_s, now)
        queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)
        if not seat.batches:
            self._busy.remove(seat)
            seat.idle_since = now
            if seat.leaving:
                self._release(seat)

    def _note_ended(self, seat: WorkerSeat, now: float) -> None:
        """Takes note of the requests of a continuous batch that a worker has ended."""
        queue = self._queues[seat.model_index]
        mailbox: BatcherMailbox = seat.mailbox  # type: ignore[assignment]
        seat.noted = seat.news  # read before the slots: what ends after that is news again
        arrivals: list[int] = []
        named: list[int] = []
        for batch in tuple(seat.batches):
            ended = [place for place, job in enumerate(batch.jobs) if self._has_ended(job, batch.generations[place])]
            for place in reversed(ended):
                arrived_ns = batch.arrivals_ns.pop(place)
                batch.generations.pop(place)
                self._leave_mailbox([batch.jobs.pop(place)])
                if queue.sequences is not None:
                    queue.sequences.ended(batch.sequences.pop(place), now)
                arrivals.append(arrived_ns)
                if arrived_ns in batch.named_ns:
                    batch.named_ns.remove(arrived_ns)
                    named.append(arrived_ns)
            if not batch.jobs:
                seat.batches.remove(batch)
        if queue.sequences is not None:
            self._refuse(queue.sequences.end_marked(mailbox.take_ended()))
        if arrivals:
            seat.idle_since = now
            service_s = mailbox.words[MailWord.SERVICE_NS] / 1e9
            queue.counters.answered(arrivals, named, now, service_s)
            queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)

    def _ids_of(self, job: int) -> tuple[str, str]:
        return self._sources[job >> SEGMENT_SHIFT].segment.ids(job & _SLOT_MASK)

    def _generation(self, job: int) -> int:
        return self._sources[job >> SEGMENT_SHIFT].segment.states[job & _SLOT_MASK] >> 8

    def _has_ended(self, job: int, generation: int) -> bool:
        """Whether a job that was handed over has its answer; its slot may have the next request by now."""
        word = self._sources[job >> SEGMENT_SHIFT].segment.states[job & _SLOT_MASK]
        return word >> 8 != generation or word & _STATE not in _WITH_WORKER

    def _show_last_batch(self, batch: Batch, handover_s: float, now: float) -> None:
        """Puts the times of a finished batch on the board, for the gauges that show the last one."""
        words, row = self._words, self._row
        waited_us = int(batch.posted_at * 1e6) - batch.arrivals_ns[0] // 1000
        words[row + BatcherWord.LAST_QUEUE_US] = max(0, waited_us)
        words[row + BatcherWord.LAST_HANDOVER_US] = max(0, int(handover_s * 1e6))
        words[row + BatcherWord.LAST_BATCH_NS] = int(now * 1e9)

    def _counters(self, model: int) -> ModelCounters:
        return ModelCounters(self._words, self._board.model_row(self._index, model))

    def _leave_mailbox(self, jobs: list[int]) -> None:
        for job in jobs:
            source = self._sources[job >> SEGMENT_SHIFT]
            source.in_mailboxes -= 1
            if source.retired and source.in_mailboxes == 0:
                self._drop_source(source)

    def _requeue_unbegun(self, queue: ModelQueue, batch: Batch, now: float) -> None:
        """Puts the jobs of a batch that no handler has seen back at the head of the queue."""
        unbegun = []
        for job in batch.jobs:
            source = self._sources.get(job >> SEGMENT_SHIFT)
            if source is None or source.retired:
                continue
            if source.segment.states[job & _SLOT_MASK] & _STATE == SlotState.CLAIMED:
                unbegun.append(job)
        # What a sequence's worker knew of it is gone with the worker: there is no other to go on with.
        if queue.accepting and queue.sequences is None:
            queue.jobs.put_back(unbegun, now)
        else:
            self._refuse(unbegun)

    # -- what no event announces

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK_S
        now_ns = time.monotonic_ns()
        self._words[self._row + BatcherWord.HEARTBEAT_NS] = now_ns
        if self._orphans and now >= self._adopt_until:
            self._refuse([job for _, job in self._orphans])
            self._orphans.clear()
        for queue in self._queues.values():
            self._expire(queue, now)
            self._watch_batches(queue, now_ns, now)
            queue.counters.show(ModelWord.READY_WORKERS, queue.workers)
            queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)
            queue.counters.show(ModelWord.QUEUED, len(queue.jobs))

    def _expire(self, queue: ModelQueue, now: float) -> None:
        """Answers queued jobs whose client has gone or whose own deadline has passed; they are never run."""
        oldest_ns = queue.oldest_in_time_ns(now)

        def is_over(job: int, came_at: float) -> bool:
            segment, slot = self._sources[job >> SEGMENT_SHIFT].segment, job & _SLOT_MASK
            return bool(segment.cancels[slot]) or segment.arrival_ns(slot) < oldest_ns

        for job in queue.jobs.drop(is_over):
            self._end_unbegun(queue, job, oldest_ns)
        if queue.sequences is not None:
            self._refuse(queue.sequences.expire(now))

    def _end_unbegun(self, queue: ModelQueue, job: int, oldest_ns: int) -> None:
        """Answers a job that is not to be run any more: it is too late, or its client has gone."""
        source = self._sources[job >> SEGMENT_SHIFT]
        slot = job & _SLOT_MASK
        # Looked at first: the web worker gives up a request that is too late as it does one whose client has gone.
        if source.segment.arrival_ns(slot) < oldest_ns:
            source.segment.fail_late(slot)
            queue.counters.add(ModelWord.EXPIRED)
        else:
            source.segment.fail_cancelled(slot)
            queue.counters.add(ModelWord.CANCELLED)
        source.touched = True

    def _is_answered(self, batch: Batch) -> bool:
        """Whether nobody works on any job of a batch any more, whatever its worker has said so far."""
        return not any(
            job >> SEGMENT_SHIFT in self._sources
            and self._sources[job >> SEGMENT_SHIFT].segment.states[job & _SLOT_MASK] & _STATE in _WITH_WORKER
            for job in batch.jobs
        )

    def _watch_batches(self, queue: ModelQueue, now_ns: int, now: float) -> None:
        for seat in queue.seats:
            if not seat.batches or seat.killed:
                continue
            words = seat.mailbox.words  # type: ignore[attr-defined]
            started_ns = words[MailWord.START_NS]
            # Of a continuous batch each step has its own time; between two steps there is none.
            if not started_ns or (not queue.joins_steps and seat.mailbox.started <= seat.mailbox.done):
                continue
            running_s = (now_ns - started_ns) / 1e9
            if running_s > queue.spec.response_timeout_s:
                seat.killed = True
                self._notify(("kill_worker", seat.worker_id, seat.start_count))
            elif len(seat.batches) > 1 and running_s > queue.overdue_after() and queue.idle_seat() is not None:
                self._take_back(queue, seat, now)

    def _take_back(self, queue: ModelQueue, seat: WorkerSeat, now: float) -> None:
        """Gives the batch that waits behind a slow one to an idle worker instead."""
        batch = seat.batches[-1]
        if batch.revoked:
            return
        batch.revoked = True
        if seat.mailbox.revoke(batch.number):
            # The worker will skip it; its place stays taken until it has said so.
            self._requeue_unbegun(queue, batch, now)
            self._leave_mailbox(batch.jobs)
            batch.jobs = []

    def _ring_touched(self) -> None:
        for source in self._sources.values():
            if source.touched:
                source.touched = False
                source.bell.ring()

    # -- commands of the control thread

    def _on_stop(self) -> None:
        self._running = False

    def _on_attach_segment(self, prefix: str, index: int) -> None:
        if index not in self._sources:
            try:
                segment = Segment.attach(prefix, index)
            except (FileNotFoundError, ValueError) as error:
                logger.error("Segment %d cannot be attached: %s", index, error)
            else:
                source = self._sources[index] = _Source(segment, self._index, prefix)
                self._adopt(source)
        self._notify(("segment_attached", index))

    def _adopt(self, source: _Source) -> None:
        """Sorts out what an earlier batcher left in a segment: claimed jobs are queued again, begun ones fail."""
        now = time.monotonic()
        segment = source.segment
        for slot, word in enumerate(segment.states):
            state = word & _STATE
            if state not in (SlotState.CLAIMED, SlotState.RUNNING, SlotState.STREAMING):
                continue
            request = layout.REQUEST.unpack_from(segment.buffer, segment.layout.slot(slot))
            model, batcher, has_sequence = request[2], request[7], request[9] > 0
            if batcher != self._index:
                continue
            if state == SlotState.CLAIMED and has_sequence:
                # Its sequence's worker has died with the batcher, and what it knew with it.
                segment.fail(slot, NO_WORKER, "")
                source.touched = True
            elif state == SlotState.CLAIMED:
                self._orphans.append((model, segment.index << SEGMENT_SHIFT | slot))
            else:
                segment.fail(slot, 500, WORKER_DIED)
                source.touched = True
        for queue in self._queues.values():
            self._take_in_orphans(queue, now)

    def _take_in_orphans(self, queue: ModelQueue, now: float) -> None:
        index = queue.spec.index
        queue.jobs.put_back([job for model, job in self._orphans if model == index], now)
        self._orphans = [(model, job) for model, job in self._orphans if model != index]

    def _on_retire_segment(self, index: int) -> None:
        source = self._sources.get(index)
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
            self._drop_source(source)

    def _drop_source(self, source: _Source) -> None:
        index = source.segment.index
        if self._sources.pop(index, None) is not None:
            source.bell.close()
            source.segment.close()
            self._notify(("segment_retired", index))

    def _on_load_model(self, spec: ModelSpec) -> None:
        if spec.index not in self._queues:
            queue = self._queues[spec.index] = ModelQueue(
                spec, self._counters(spec.index), self._is_answered, self._ids_of
            )
            self._take_in_orphans(queue, time.monotonic())

    def _on_unload_model(self, index: int) -> None:
        queue = self._queues.get(index)
        if queue is None:
            self._notify(("model_unloaded", index))
            return
        if queue not in self._closing:
            queue.closes_at = time.monotonic() + LAST_ARRIVALS_S
            self._closing.append(queue)
        self._forget_if_empty(queue)

    def _close_if_served(self, queue: ModelQueue, now: float) -> None:
        """Lets the workers of an unregistered version go, when nothing waits for them and nothing can come any more."""
        if now < queue.closes_at:
            self._wake_at = min(self._wake_at, queue.closes_at)
        elif not len(queue.jobs):
            queue.accepting = False
            self._closing.remove(queue)
            for seat in queue.held:
                self._let_go(seat)
            queue.held.clear()

    def _on_worker_ready(self, worker_id: int, start_count: int, model_index: int, mailbox: BatcherMailbox) -> None:
        seat = self._seats[worker_id] = WorkerSeat(worker_id, start_count, model_index, mailbox)
        queue = self._queues.get(model_index)
        if queue is None:
            self._release(seat)
        else:
            seat.idle_since = time.monotonic()
            queue.seats.append(seat)
            self._show_workers(queue)

    def _on_release_worker(self, worker_id: int, start_count: int) -> None:
        seat = self._seats.get(worker_id)
        if seat is None or seat.start_count != start_count:
            self._notify(("worker_released", worker_id, start_count))
            return
        queue = self._queues[seat.model_index]
        if queue in self._closing:
            queue.held.append(seat)
        else:
            self._let_go(seat)

    def _let_go(self, seat: WorkerSeat) -> None:
        """Gives a worker no further batch; it leaves after those that it has, and takes its sequences along."""
        seat.leaving = True
        queue = self._queues[seat.model_index]
        if queue.sequences is not None:
            self._refuse(queue.sequences.end_those_of(seat.worker_id))
        self._show_workers(queue)
        if not seat.batches:
            self._release(seat)

    def _on_worker_gone(self, worker_id: int, start_count: int, oom: bool, mailbox: BatcherMailbox) -> None:
        """Answers what a dead worker had begun; what it had not begun waits for the next one."""
        seat = self._seats.get(worker_id)
        if seat is not None and seat.start_count == start_count:
            del self._seats[worker_id]
            self._settle(seat, oom)
        mailbox.remove()

    def _settle(self, seat: WorkerSeat, oom: bool) -> None:
        now = time.monotonic()
        queue = self._queues.get(seat.model_index)
        if seat in self._streaming:
            self._note_ended(seat, now)
        for seats in (self._busy, self._streaming):
            if seat in seats:
                seats.remove(seat)
        for batch in reversed(seat.batches):
            self._settle_dead_batch(queue, batch, oom, now)
        seat.batches.clear()
        if queue is not None:
            if queue.sequences is not None:
                self._refuse(queue.sequences.end_those_of(seat.worker_id))
            queue.seats.remove(seat)
            if seat in queue.held:
                queue.held.remove(seat)
            self._show_workers(queue)
            self._forget_if_empty(queue)

    def _settle_dead_batch(self, queue: ModelQueue | None, batch: Batch, oom: bool, now: float) -> None:
        for job in batch.jobs:
            source = self._sources.get(job >> SEGMENT_SHIFT)
            if source is None:
                continue
            slot = job & _SLOT_MASK
            state = source.segment.states[slot] & _STATE
            source.touched = True
            if state in (SlotState.RUNNING, SlotState.STREAMING):
                source.segment.fail(slot, 507 if oom else 500, WORKER_DIED)
                if queue is not None:
                    queue.counters.add(ModelWord.FAILED)
        if queue is not None:
            self._requeue_unbegun(queue, batch, now)
        self._leave_mailbox(batch.jobs)

    def _release(self, seat: WorkerSeat) -> None:
        """Lets an idle worker go: its mailbox says stop, it leaves by itself."""
        self._seats.pop(seat.worker_id, None)
        queue = self._queues.get(seat.model_index)
        if queue is not None and seat in queue.seats:
            queue.seats.remove(seat)
        seat.mailbox.stop()  # type: ignore[attr-defined]
        self._notify(("worker_released", seat.worker_id, seat.start_count))
        if queue is not None:
            self._forget_if_empty(queue)

    def _refuse(self, jobs: list[int]) -> None:
        for job in jobs:
            source = self._sources[job >> SEGMENT_SHIFT]
            source.segment.fail(job & _SLOT_MASK, NO_WORKER, "")
            source.touched = True

    def _forget_if_empty(self, queue: ModelQueue) -> None:
        """Ends an unregistered version that has no workers any more; what still waits for one is answered."""
        if queue.closes_at < math.inf and not queue.seats:
            self._refuse(queue.jobs.take(len(queue.jobs)))
            if queue in self._closing:
                self._closing.remove(queue)
            self._queues.pop(queue.spec.index, None)
            queue.counters.clear_gauges()
            self._notify(("model_unloaded", queue.spec.index))

    def _show_workers(self, queue: ModelQueue) -> None:
        queue.counters.show(ModelWord.READY_WORKERS, queue.workers)
