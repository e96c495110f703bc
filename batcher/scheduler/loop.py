"""The batcher's hot loop: drain the submission rings, form batches, hand them over, learn when they are done.

Owns: job queues, the consumer side of all submission rings, CLAIMED slots, this batcher's words on the board.
Parts: `sources.Sources` the attached segments, `hand_over.HandOver` the batches that workers have, `roster.Roster` the
models and workers. All of it runs in the batcher, on a thread of its own; the control thread talks to it by `command`
and is told by `notify`.
Rules: README.md beside this file. Payload bytes are never touched here.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from wsgi_ts.batcher.scheduler.counters import ModelCounters
from wsgi_ts.batcher.scheduler.dispatch import ModelQueue
from wsgi_ts.batcher.scheduler.hand_over import HandOver
from wsgi_ts.batcher.scheduler.job import Job, job_in
from wsgi_ts.batcher.scheduler.roster import Roster
from wsgi_ts.batcher.scheduler.sources import NO_WORKER, Source, Sources, end_unbegun
from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import GENERATION_SHIFT, STATE_MASK, BatcherWord, ModelWord, News, SlotState
from wsgi_ts.batcher.shm.ring import RingDamaged

_CLAIM = SlotState.CLAIMED - SlotState.READY
#: Longest sleep of the loop; also the period of the work that no event announces (deadlines, heartbeat).
TICK_S = 0.25
#: Longest sleep without being woken for submissions: bounds how late a full queue refuses when a short batch hangs.
UNANNOUNCED_S = 0.02
#: Jobs and batches hold no cycles: the collector need not look often.
GC_THRESHOLD = 50_000


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
        self._words = board.words
        self._bell = board.batcher_bell(index)
        self._row = board.batcher_row(index)
        self._queues: dict[int, ModelQueue] = {}
        self._sources = Sources(index, self._queues, self._counters, notify)
        self._attached = self._sources.attached
        self._hand_over = HandOver(self._sources, board.words, self._row, notify)
        self._busy, self._streaming = self._hand_over.busy, self._hand_over.streaming
        self._roster = Roster(self._queues, self._sources, self._hand_over, self._counters, notify)
        self._commands: deque[tuple[Any, ...]] = deque()
        self._carry_out: dict[str, Callable[..., None]] = {
            "stop": self._stop,
            "attach_segment": self._sources.attach,
            "retire_segment": self._sources.retire,
            "load_model": self._roster.load_model,
            "unload_model": self._roster.unload_model,
            "worker_ready": self._roster.worker_ready,
            "release_worker": self._roster.release_worker,
            "worker_gone": self._roster.worker_gone,
        }
        self._wake_at = 0.0
        self._next_tick = 0.0
        self._running = True

    def command(self, name: str, *arguments: Any) -> None:
        """Hands a command to the loop, from another thread.

        Args:
            name: "stop", "attach_segment" or "retire_segment" (see `Sources`), "load_model", "unload_model",
                "worker_ready", "release_worker" or "worker_gone" (see `Roster`).
            arguments: those of the method.
        """
        self._commands.append((name, *arguments))
        self._bell.force()

    def _stop(self) -> None:
        self._running = False

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
            self._carry_out[name](*arguments)
            worked = True
        # Ends before arrivals: a client's next request must not be counted before the answer it follows.
        for seat in tuple(self._busy):
            if seat.batches and seat.mailbox.done >= seat.batches[0].number:
                self._hand_over.complete(self._queues[seat.model_index], seat, now)
                if seat.leaving and not seat.batches:
                    self._roster.release(seat)
                worked = True
        if self._streaming:
            worked |= self._look_at_streams(now)
        for source in self._attached.values():
            if source.ring.waiting and not source.retired:
                self._drain(source, now)
                worked = True
        self._wake_at = now + TICK_S
        for queue in self._queues.values():
            if len(queue.jobs):
                self._dispatch(queue, now)
        if self._roster.closing:
            self._wake_at = min(self._wake_at, self._roster.close_served(now))
        if now >= self._next_tick:
            self._tick(now)
        self._sources.ring_touched()
        return worked

    def _look_at_streams(self, now: float) -> bool:
        """Takes note of what happened in the continuous batches; True when something had."""
        worked = False
        for seat in tuple(self._streaming):
            if seat.news != seat.noted:
                self._hand_over.note_ended(self._queues[seat.model_index], seat, now)
                if seat.leaving and not seat.batches:
                    self._roster.release(seat)
                worked = True
        return worked

    def _sleep(self) -> None:
        """Sleeps until there is news; at once over when there is."""
        if self._something_waits():
            return
        wanted = self._wanted_news()
        limit_s = self._wake_at - time.monotonic()
        if not wanted & News.SUBMISSION:
            limit_s = min(limit_s, UNANNOUNCED_S)
        self._bell.wait(self._something_waits, limit_s, wanted=wanted)

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
        if self._sources.any_retired:
            wanted |= News.COMPLETION
        return wanted or News.SUBMISSION | News.COMPLETION

    def _something_waits(self) -> bool:
        return bool(
            self._commands
            or any(source.ring.waiting and not source.retired for source in self._attached.values())
            or any(seat.batches and seat.mailbox.done >= seat.batches[0].number for seat in self._busy)
            or any(seat.news != seat.noted for seat in self._streaming)
        )

    # -- submission rings

    def _drain(self, source: Source, now: float) -> None:
        states = source.segment.states
        arrivals: dict[int, list[int]] = {}
        try:
            entries = source.ring.pop_all()
        except RingDamaged as damage:
            self._sources.find_again(source, damage)
            return
        for place in range(0, len(entries), 2):
            entry = entries[place]
            slot = entry & layout.RING_SLOT_MASK
            word = states[slot]
            if (
                word & STATE_MASK != SlotState.READY
                or (word >> GENERATION_SHIFT) & layout.RING_GENERATION_MASK != entry >> layout.RING_GENERATION_SHIFT
            ):
                continue  # a scan has found it before
            model = entry >> layout.RING_MODEL_SHIFT & layout.RING_MODEL_MASK
            job = job_in(source, slot, word, now)
            queue = self._queues.get(model)
            if queue is None and self._sources.adopting(now):
                self._sources.add_orphan(model, job)
                continue
            if queue is None or not queue.accepting or not queue.jobs.offer(job):
                self._refuse(model, job)
                continue
            states[slot] = word + _CLAIM
            tally = arrivals.get(model)
            if tally is None:
                tally = arrivals[model] = [0, 0, 0, 0]
            tally[0] += 1
            tally[3] += job.named
            idle_us = entries[place + 1]
            if idle_us != layout.NOT_RETURNING:
                tally[1] += idle_us
                tally[2] += 1
        for model, (count, idle_us, returning, named) in arrivals.items():
            queue = self._queues[model]
            queue.policy.on_arrival(now, count, idle_us / 1e6, returning)
            queue.counters.add(ModelWord.REQUESTS, count - named)
            queue.counters.add(ModelWord.REQUESTS_NAMED, named)
            queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)

    def _refuse(self, model: int, job: Job) -> None:
        """Answers a request for which there is no worker, or no room in the queue."""
        job.fail(NO_WORKER, "")
        counters = self._counters(model)
        counters.add(ModelWord.REFUSED)
        counters.add(ModelWord.REQUESTS_NAMED if job.named else ModelWord.REQUESTS)

    def _counters(self, model: int) -> ModelCounters:
        return ModelCounters(self._words, self._board.model_row(self._index, model))

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
            self._hand_over.post(queue, place[0], jobs.take(place[1]), now)
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
            self._hand_over.post(queue, seat, jobs.take(queue.batch_size), now)

    def _dispatch_sequences(self, queue: ModelQueue, now: float) -> None:
        taken = queue.take_sequences()
        while taken is not None:
            self._hand_over.post(queue, *taken, now)
            taken = queue.take_sequences()

    # -- what no event announces

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK_S
        now_ns = time.monotonic_ns()
        self._words[self._row + BatcherWord.HEARTBEAT_NS] = now_ns
        self._sources.refuse_orphans(now)
        for queue in self._queues.values():
            self._expire(queue, now)
            self._hand_over.watch(queue, now_ns, now)
            queue.counters.show(ModelWord.READY_WORKERS, queue.workers)
            queue.counters.show(ModelWord.OUTSTANDING, queue.outstanding)
            queue.counters.show(ModelWord.QUEUED, len(queue.jobs))

    def _expire(self, queue: ModelQueue, now: float) -> None:
        """Answers queued jobs whose client has gone or whose own deadline has passed; they are never run."""
        oldest_ns = queue.oldest_in_time_ns(now)
        for job in queue.jobs.drop(lambda job: job.is_over(oldest_ns)):
            end_unbegun(job, oldest_ns, queue.counters)
        if queue.sequences is not None:
            self._sources.refuse(queue.sequences.expire(now))
