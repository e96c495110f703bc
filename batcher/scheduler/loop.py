"""Who acts: the batcher's hot loop reads what has happened, tells the scheduler, and carries out what that decides.

Owns: the consumer side of all submission rings, CLAIMED slots, this batcher's words on the board, its sides of the
mailboxes. It runs in the batcher, on a thread of its own; the control thread talks to it by `command` and is told by
`notify`. Rules: README.md in the folder above. Payload bytes are never touched here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from wsgi_ts.batcher.scheduler.actions import (
    Action,
    Dispatch,
    Fail,
    Kill,
    Record,
    Release,
    Repeat,
    Revoke,
    Settle,
    Unloaded,
)
from wsgi_ts.batcher.scheduler.counters import CountersByModel
from wsgi_ts.batcher.scheduler.job import Found
from wsgi_ts.batcher.scheduler.model_queue import ModelQueue, Worker
from wsgi_ts.batcher.scheduler.scheduler import UNANNOUNCED_S, Scheduler
from wsgi_ts.batcher.scheduler.segments import AttachedSegment
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import ModelWord, News, SlotState
from wsgi_ts.batcher.shm.mailbox import BatcherMailbox
from wsgi_ts.batcher.shm.ring import RingDamaged
from wsgi_ts.batcher.shm.worker_layout import MailWord
from wsgi_ts.messages import (
    AttachSegment,
    KillWorker,
    ModelSpec,
    ReleaseWorker,
    RetireSegment,
    SegmentAttached,
    SegmentRetired,
    Stop,
    UnloadModel,
    WorkerReleased,
)

log = logging.getLogger("wsgi_ts.batcher")

#: Longest sleep of the loop; also the period of the work that no event announces (deadlines, heartbeat).
TICK_S = 0.25


class TakeModel(NamedTuple):
    """Command: make a model version known, or renew its settings; `queue`: one of its own, by a batching plugin."""

    spec: ModelSpec
    queue: ModelQueue | None = None


class TakeWorker(NamedTuple):
    """Command: a worker has loaded its model; give it batches through its mailbox."""

    worker: Worker
    mailbox: BatcherMailbox


class SettleWorker(NamedTuple):
    """Command: a worker is dead, for lack of memory (`oom`) or otherwise; settle its jobs and remove its mailbox."""

    mailbox: BatcherMailbox
    oom: bool = False


#: What the control thread tells the loop, and what the loop tells the control thread.
Command = AttachSegment | RetireSegment | TakeModel | UnloadModel | TakeWorker | ReleaseWorker | SettleWorker | Stop
Notice = SegmentAttached | SegmentRetired | WorkerReleased | KillWorker


class BatcherLoop:
    """State and steps of the loop: while it `is_running`, a `turn`, and then `sleep`.

    Args:
        notify: called with each notice for the control thread, at once and on the loop's thread.

    Attributes:
        is_running: False after the command Stop.
    """

    def __init__(self, board: Board, index: int, notify: Callable[[Notice], None]) -> None:
        self._board = board
        self._index = index
        self._notify = notify
        self._bell = board.batcher_bell(index)
        self._scheduler = Scheduler(time.monotonic())
        self._segments: dict[int, AttachedSegment] = {}
        self._mailboxes: dict[Worker, BatcherMailbox] = {}
        self._counters = CountersByModel(board, index)
        self._commands: deque[Command] = deque()
        self._next_tick = 0.0
        self.is_running = True

    def command(self, command: Command) -> None:
        """Hands a command to the loop, from another thread."""
        self._commands.append(command)
        self._bell.force()

    def turn(self) -> bool:
        """One pass over everything that can have happened; True when something had."""
        now = time.monotonic()
        worked = False
        while self._commands:
            self._obey(self._commands.popleft(), now)
            self._show_gauges()
            worked = True
        # Ends before arrivals: a client's next request must not be counted before the answer it follows.
        for worker in tuple(self._scheduler.busy):
            if self._mailboxes[worker].has_news:
                self._read_mailbox(worker, now)
                worked = True
        for segment in self._segments.values():
            if segment.ring.waiting and not segment.retired:
                self._take_submitted(segment, now)
                worked = True
        actions = self._scheduler.dispatch(now)
        if actions:
            self._act(actions, now)
        if now >= self._next_tick:
            self._tick(now)
        self._look_after_segments()
        return worked

    # -- read, and tell the scheduler

    def _read_mailbox(self, worker: Worker, now: float) -> None:
        mailbox = self._mailboxes[worker]
        progress = mailbox.read_news()
        counters = self._counters[worker.model]
        counters.add(ModelWord.EXECUTIONS, mailbox.take_executions())
        counters.add_tallies(mailbox.take_tallies())
        self._act(self._scheduler.progressed(worker, progress, now), now)
        self._show_load(worker.model)

    def _take_submitted(self, segment: AttachedSegment, now: float) -> None:
        try:
            arrivals = segment.take_submitted(now)
        except RingDamaged as damage:
            log.error("The ring of segment %d is damaged: %s; a scan finds its requests", segment.index, damage)
            segment.ring.skip_all()
            self._recover(segment.scan(now, (SlotState.READY,)), now)
            return
        for model, jobs in arrivals.items():
            self._counters.arrived(model, jobs)
            self._act(self._scheduler.arrived(model, jobs, now), now)
            self._show_load(model)

    def _recover(self, found: list[Found], now: float) -> None:
        for each in found:
            if each.state == SlotState.READY:
                self._counters.arrived(each.model, [each.job])
        self._act(self._scheduler.recover(found, now), now)

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK_S
        self._counters.beat(time.monotonic_ns())
        self._act(self._scheduler.tick(now), now)
        for worker in self._scheduler.busy:
            words = self._mailboxes[worker].words
            started, done, begun_at = words[MailWord.STARTED], words[MailWord.DONE], words[MailWord.START_NS] / 1e9
            self._act(self._scheduler.watch(worker, started, done, begun_at, now), now)
        self._show_gauges()

    # -- commands

    def _obey(self, command: Command, now: float) -> None:
        match command:
            case AttachSegment(index):
                self._attach(index, now)
            case RetireSegment(index):
                self._retire(index)
            case TakeModel(spec, queue):
                self._act(self._scheduler.load_model(spec, now, queue), now)
            case UnloadModel(index):
                self._act(self._scheduler.unload_model(index, now), now)
            case TakeWorker(worker, mailbox):
                self._mailboxes[worker] = mailbox
                self._act(self._scheduler.worker_ready(worker, now), now)
            case ReleaseWorker(worker_id, start_count):
                self._release(worker_id, start_count, now)
            case SettleWorker(mailbox, oom):
                self._settle(mailbox, oom, now)
            case Stop():
                self.is_running = False

    def _attach(self, index: int, now: float) -> None:
        """Attaches a segment and takes over what lies in it; one that cannot be attached is logged."""
        if index not in self._segments:
            try:
                segment = self._segments[index] = AttachedSegment(self._board.prefix, index, self._index)
            except (FileNotFoundError, ValueError) as error:
                log.error("Segment %d cannot be attached: %s", index, error)
            else:
                self._recover(segment.scan(now), now)
        self._notify(SegmentAttached(index))

    def _retire(self, index: int) -> None:
        """Gives up a segment whose web worker is dead; it is detached when no model worker can write to it."""
        segment = self._segments.get(index)
        if segment is None:
            self._notify(SegmentRetired(index))
        else:
            segment.retire()
            self._scheduler.retire(segment)

    def _release(self, worker_id: int, start_count: int, now: float) -> None:
        for worker in self._mailboxes:
            if (worker.worker_id, worker.start_count) == (worker_id, start_count):
                self._act(self._scheduler.release_worker(worker, now), now)
                return
        self._notify(WorkerReleased(worker_id, start_count))

    def _settle(self, mailbox: BatcherMailbox, oom: bool, now: float) -> None:
        """Settles the jobs of a worker that is dead, if it was ready, and removes its mailbox."""
        for worker in [worker for worker, its in self._mailboxes.items() if its is mailbox]:
            self._read_mailbox(worker, now)
            if self._mailboxes.pop(worker, None) is not None:
                self._act(self._scheduler.worker_gone(worker, oom, now), now)
        for segment in self._segments.values():
            segment.touched = True  # the worker may have answered and not rung
        mailbox.remove()

    # -- carry out what the scheduler decides

    def _act(self, actions: Iterable[Action], now: float) -> None:
        for action in actions:
            match action:
                case Dispatch(worker, batch):
                    jobs = batch.jobs
                    entries = [job.segment.mail_base | job.slot for job in jobs]
                    busy = len(self._scheduler.busy)
                    self._mailboxes[worker].post(entries, batch.reason, int(batch.posted_at * 1e9), busy)
                    self._counters.dispatched(worker.model, jobs, now, batch.reason)
                    self._show_load(worker.model)
                case Record():
                    self._counters.record(action, now)
                case Fail(model, jobs, status, text, counted, facts):
                    for job in jobs:
                        job.segment.fail(job.slot, status, text, facts)
                    self._counters[model].add(counted, len(jobs))
                case Repeat() | Settle():
                    self._end_execution(action)
                case Revoke(worker, batches):
                    begun = self._mailboxes[worker].revoke(batches[0].number)
                    for batch in reversed(batches):  # each goes to the head of the queue
                        if batch.number > begun:
                            self._act(self._scheduler.revoked(worker, batch), now)
                case Kill(worker):
                    self._notify(KillWorker(worker.worker_id, worker.start_count))
                case Release(worker):
                    self._mailboxes.pop(worker).stop()
                    self._notify(WorkerReleased(worker.worker_id, worker.start_count))
                case Unloaded(model):
                    self._counters[model].clear_gauges()

    def _end_execution(self, failed: Repeat | Settle) -> None:
        """What a handler has had for nothing waits again, or is answered with what its worker has written."""
        counters = self._counters[failed.model]
        if isinstance(failed, Repeat):
            for job in failed.jobs:
                job.segment.claim_again(job.slot)
            counters.add(ModelWord.HALVED)
        else:
            for job in failed.jobs:
                job.segment.settle(job.slot)
            counters.add(ModelWord.HANDLER_ERRORS, len(failed.jobs))

    def _show_load(self, index: int) -> None:
        """Shows how many requests a model has and how many of them wait: at one time, as the rest are running."""
        model = self._scheduler.models.get(index)
        if model is not None:
            self._counters[index].show_load(model)

    def _show_gauges(self) -> None:
        for index, model in self._scheduler.models.items():
            self._counters[index].show_all(model)
        self._show_kv_caches()

    def _show_kv_caches(self) -> None:
        """Shows how full the KV caches are of the workers that tell it; one that is gone has no mailbox any more."""
        told: dict[int, list[int]] = {index: [] for index in self._scheduler.models}
        for worker, mailbox in self._mailboxes.items():
            word = mailbox.words[MailWord.KV_CACHE]
            if word and worker.model in told:
                told[worker.model].append(word - 1)
        for index, usages in told.items():
            self._counters[index].show(ModelWord.KV_CACHE, sum(usages))
            self._counters[index].show(ModelWord.KV_CACHE_WORKERS, len(usages))

    def _look_after_segments(self) -> None:
        """Wakes the web workers for which there are answers, and detaches what nobody writes to any more."""
        for segment in tuple(self._segments.values()):
            if segment.touched:
                segment.touched = False
                segment.bell.ring()
            if segment.retired and not self._scheduler.is_in_flight(segment):
                del self._segments[segment.index]
                segment.close()
                self._notify(SegmentRetired(segment.index))

    # -- sleep

    def sleep(self) -> None:
        """Sleeps until there is news; at once over when there is."""
        if self._something_waits():
            return
        now = time.monotonic()
        wanted = self._scheduler.wanted_news()
        if any(segment.retired for segment in self._segments.values()):
            wanted |= News.COMPLETION
        limit_s = min(TICK_S, self._scheduler.wake_at - now)
        if not wanted & News.SUBMISSION:
            limit_s = min(limit_s, UNANNOUNCED_S)
        self._bell.wait(self._something_waits, limit_s, wanted=wanted, sleep=self._sleep_once)

    def _sleep_once(self, seconds: float) -> bool:
        # Who reads the counters rings, and waits for this: what came before the ring has been counted.
        self._counters.going_to_sleep()
        return self._bell.sleep(seconds)

    def _something_waits(self) -> bool:
        for segment in self._segments.values():
            if segment.ring.waiting and not segment.retired:
                return True
        for worker in self._scheduler.busy:
            if self._mailboxes[worker].has_news:
                return True
        return bool(self._commands)
