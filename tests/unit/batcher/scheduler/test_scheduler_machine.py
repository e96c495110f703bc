"""The scheduler among web workers, model workers, batchers and models that come and go in any order.

The machine plays everything around the scheduler: slots are words in plain memory, model workers and their mailboxes
are numbers, time is a number. After each step it carries out what the scheduler has decided and checks that it was
allowed (`Around.act`), and that nothing is lost, late or starved (the invariants). Numbers in the names are those of
the rules in batcher/README.md.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.jobs import Slots

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
from wsgi_ts.batcher.scheduler.halving import REMEMBERED_S
from wsgi_ts.batcher.scheduler.job import Found, Job
from wsgi_ts.batcher.scheduler.model_queue import Batch, Worker
from wsgi_ts.batcher.scheduler.recovered import RECOVERY_S
from wsgi_ts.batcher.scheduler.redelivery import MOST_DELIVERIES
from wsgi_ts.batcher.scheduler.scheduler import Scheduler
from wsgi_ts.batcher.shm.layout import GENERATION_SHIFT, STATE_MASK, News, SlotState
from wsgi_ts.batcher.shm.worker_layout import MAIL_PLACES, Progress, mark_of
from wsgi_ts.messages import ModelSpec

SLOTS = 24
QUEUE, DEADLINE_S, WINDOW_S, RESPONSE_S = 5, 3.0, 1.0, 8.0
PLAIN, LATE, FIXED, TICKETS, STREAMS, SEQUENCES, STREAMED_SEQUENCES, REPEATS, ALONE = range(9)
MOST_EXECUTIONS = 2
KINDS = {
    PLAIN: {"batch_size": 3},
    LATE: {"batch_size": 2, "client_timeout_ms": int(DEADLINE_S * 1000)},
    FIXED: {"batch_size": 3, "batch_policy": "fixed", "max_batch_delay_ms": int(WINDOW_S * 1000)},
    TICKETS: {"use_job_ticket": True, "batch_size": 3},
    STREAMS: {"batch_size": 3, "continuous_batching": True},
    SEQUENCES: {"batch_size": 2, "sequence_batching": True},
    STREAMED_SEQUENCES: {"batch_size": 2, "sequence_batching": True, "continuous_batching": True},
    REPEATS: {"batch_size": 4, "max_executions": MOST_EXECUTIONS},
    ALONE: {"batch_size": 1},
}
MODELS = st.sampled_from(sorted(KINDS))
ANY = st.integers(0, 1 << 16)


def spec_of(kind: int) -> ModelSpec:
    """A model version; its index is its kind."""
    common = {
        "batch_policy": "none",
        "job_queue_size": QUEUE,
        "response_timeout_s": RESPONSE_S,
        "max_sequences": 2,
        "max_sequence_queue": 3,
        "sequence_max_idle_ms": 5000,
    }
    return ModelSpec(kind, f"m{kind}", "1", "/m", "h", None, **{**common, **KINDS[kind]})  # type: ignore[arg-type]


@dataclass(eq=False)
class Request:
    """What a client has asked, and what has become of it."""

    segment: Slots
    slot: int
    generation: int
    model: int
    key: str
    arrived_at: float
    cancelled: bool = False
    begun_by: int = 0
    executions: int = 0
    together: int = 0
    answer: int = 0
    dropped: bool = False

    @property
    def is_open(self) -> bool:
        return not self.answer and not self.dropped

    @property
    def state(self) -> int:
        return self.segment.states[self.slot] & STATE_MASK

    def set_state(self, state: int) -> None:
        assert self.segment.states[self.slot] >> GENERATION_SHIFT == self.generation
        self.segment.states[self.slot] = self.generation << GENERATION_SHIFT | state


@dataclass(eq=False)
class Process:
    """A model worker and its mailbox."""

    handle: Worker
    posted: list[Batch] = field(default_factory=list)
    begun: int = 0
    done: int = 0
    running: list[Request] = field(default_factory=list)
    has_answered: bool = False
    oom: int = 0
    revoked: set[int] = field(default_factory=set)
    begun_at: float = 0.0
    marks: list[int] = field(default_factory=list)
    has_news: bool = False
    asked_to_leave: bool = False
    to_be_killed: bool = False


class Around(RuleBasedStateMachine):
    """What is around a scheduler; the rules are in `SchedulerMachine`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.requests: dict[tuple[int, int, int], Request] = {}
        self.open: list[Request] = []
        self.unseen: list[Request] = []
        self.order: dict[int, list[Request]] = {kind: [] for kind in KINDS}  # what waits, as it is to be dispatched
        self.processes: list[Process] = []
        self.kinds: list[int] = []
        self.next_worker = 9000
        self.upheavals = self.losses = 0
        self.sizes: dict[int, tuple[int, float]] = {}  # of workers that ran out of memory
        self.segments: list[Slots] = []
        self.free: list[tuple[Slots, int]] = []
        self.add_segment()
        self.add_segment()
        self.scheduler = Scheduler(self.now - RECOVERY_S, few=0)

    def add_segment(self) -> None:
        segment = Slots()
        self.segments.append(segment)
        self.free += [(segment, slot) for slot in range(SLOTS)]

    @property
    def may_upheave(self) -> bool:
        """Whether something may happen that ends most of what is under way."""
        return self.upheavals < 2

    @property
    def may_lose_worker(self) -> bool:
        """Whether a worker may end that nobody replaces: where there is none, little else can happen."""
        return self.losses < 3

    def request_of(self, job: Job) -> Request:
        return self.requests[id(job.segment), job.slot, job.generation]

    def process_of(self, worker: Worker) -> Process:
        (process,) = [process for process in self.processes if process.handle is worker]
        return process

    def is_over(self, request: Request) -> bool:
        late = request.model == LATE and self.now - request.arrived_at > DEADLINE_S
        return late or request.cancelled

    def answer(self, request: Request, status: int) -> None:
        """The one answer of a request; its slot may be used again at once."""
        assert request.is_open, "answered twice"
        request.answer = status
        request.set_state(SlotState.DONE)
        self.open.remove(request)
        self.free.append((request.segment, request.slot))

    # -- what the scheduler decides

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Dispatch(worker, batch):
                    self.check_dispatch(worker, batch)
                case Fail():
                    self.check_fail(action)
                case Repeat(model, jobs):
                    self.repeat(model, jobs)
                case Settle(_, jobs):
                    for request in map(self.request_of, jobs):
                        self.check_last_execution(request)
                        self.answer(request, 503)
                case Revoke(worker, batches):
                    assert batches[-1].number == worker.posted
                    for batch in reversed(batches):
                        self.revoke(self.process_of(worker), batch)
                case Kill(worker):
                    process = self.process_of(worker)
                    assert not process.to_be_killed
                    process.to_be_killed = True
                case Release(worker):
                    process = self.process_of(worker)
                    assert not process.running, "asked to leave while it has requests"
                    assert process.done == len(process.posted)
                    self.processes.remove(process)
                case Unloaded(model):
                    assert not any(process.handle.model == model for process in self.processes)
                case Record(_, jobs):
                    assert jobs
                    assert all(not self.request_of(job).is_open or job.segment.retired for job in jobs)

    def check_dispatch(self, worker: Worker, batch: Batch) -> None:
        process, model = self.process_of(worker), self.scheduler.models[worker.model]
        assert not process.asked_to_leave
        assert not process.to_be_killed
        process.posted.append(batch)
        assert batch.number == len(process.posted)
        assert len(process.posted) - process.done <= MAIL_PLACES
        requests = [self.request_of(job) for job in batch.jobs]
        for request in requests:
            assert request.is_open
            assert not request.begun_by, "given to a handler twice"
            assert request.state == (SlotState.AGAIN if request.executions else SlotState.CLAIMED)
            assert not self.is_over(request), "too late, or its client has gone"
        assert 0 < len(requests) <= model.batch_size
        if any(job.deliveries for job in batch.jobs):
            assert len(batch.jobs) == 1, "a suspect goes alone"
        if any(request.executions for request in requests):
            assert all(request.executions for request in requests), "an innocent beside suspects"
            assert len(requests) <= min(-(-request.together // 2) for request in requests), "not halved"
        most, until = self.sizes.get(worker.worker_id, (len(requests), 0.0))
        assert len(requests) <= most or self.now >= until, "as many as were too many a moment ago"
        waiting = self.order[worker.model]
        if model.sequences is None:
            assert requests == waiting[: len(requests)], "not first in, first out"
        else:
            for request in requests:
                assert request is next(each for each in waiting if each.key == request.key), "overtaken in its sequence"
            in_flight = [job for each in model.workers for other in each.batches for job in other.jobs]
            sequences = Counter(id(job.sequence) for job in in_flight if self.request_of(job).is_open)
            assert max(sequences.values()) == 1, "two of a sequence at once"
        if model.joins_steps:
            assert worker.in_flight <= model.batch_size
        elif len(worker.batches) > 1:
            others = [each for each in model.workers if not each.batches and not each.leaving and not each.killed]
            assert not others, "a second batch while another worker has none"
        self.order[worker.model] = [request for request in waiting if request not in requests]

    def check_fail(self, action: Fail) -> None:
        for job in action.jobs:
            request = self.request_of(job)
            if request.state in (SlotState.RUNNING, SlotState.STREAMING):
                assert action.status in (500, 507)
                alive = [process.handle.worker_id for process in self.processes]
                assert request.begun_by not in alive, "a worker may still write to this slot (rule 4)"
                if request.model == REPEATS and self.processes:
                    self.check_last_execution(request)
            elif request.state == SlotState.AGAIN and action.status == 500 and not job.deliveries:
                assert not self.processes, "only a new batcher does not know how often it has run"
            elif action.status in (408, 499):
                assert self.is_over(request)
            elif action.status in (500, 507):
                assert job.deliveries == MOST_DELIVERIES
            else:
                assert action.status == 503
            if request in self.order[request.model]:
                self.order[request.model].remove(request)
            self.answer(request, action.status)

    def repeat(self, kind: int, jobs: list[Job]) -> None:
        """A batch has failed: these wait again, at the head."""
        assert kind == REPEATS
        requests = [self.request_of(job) for job in jobs]
        for request in requests:
            assert request.is_open
            assert request.state == SlotState.RUNNING
            assert request.executions < MOST_EXECUTIONS
            assert request.together > 1
            holders = [each for each in self.processes if request in each.running]
            assert not holders, "a worker may still write to this slot (rule 4)"
            request.begun_by = 0
            request.set_state(SlotState.AGAIN)
        self.order[kind][:0] = requests

    def check_last_execution(self, request: Request) -> None:
        """It is answered with an error of its handler, or its worker's death: it must not run again."""
        model = self.scheduler.models.get(request.model)
        is_last = request.executions == MOST_EXECUTIONS or request.together == 1
        assert is_last or request.segment.retired or model is None or not model.accepting

    def note_oom(self, process: Process, together: int) -> None:
        if process.handle.model == REPEATS and together:
            self.sizes[process.handle.worker_id] = max(1, together // 2), self.now + REMEMBERED_S

    def revoke(self, process: Process, batch: Batch) -> None:
        process.revoked.add(batch.number)
        if process.begun < batch.number:
            self.queue_again([batch])
            self.act(self.scheduler.revoked(process.handle, batch))

    def queue_again(self, batches: list[Batch]) -> None:
        """What no handler has seen of these goes to the head."""
        jobs = [job for batch in batches for job in batch.jobs]
        unbegun = [request for request in map(self.request_of, jobs) if request.is_open and not request.begun_by]
        for request in unbegun:
            self.order[request.model].remove(request) if request in self.order[request.model] else None
            if request.segment.retired:
                self.drop(request)
        kept = [request for request in unbegun if request.is_open]
        if kept:
            self.order[kept[0].model][:0] = kept

    def drop(self, request: Request) -> None:
        """Nobody waits for this one any more."""
        request.dropped = True
        self.open.remove(request)
        if request in self.order[request.model]:
            self.order[request.model].remove(request)

    def tell_progress(self, process: Process) -> None:
        """The loop looks at a mailbox."""
        process.has_news = False
        done = [batch for batch in process.handle.batches if batch.number <= process.done and batch.revoked]
        self.queue_again(done)
        marks, process.marks = process.marks, []
        handle, oom = process.handle, process.oom
        if oom and oom == process.done:
            self.note_oom(process, sum(job.state == SlotState.RUNNING for job in process.posted[oom - 1].jobs))
        progress = Progress(process.done, process.begun_at, 0.001, oom, marks)
        self.act(self.scheduler.progressed(handle, progress, self.now))
        process.oom = 0

    def kill(self, process: Process, oom: bool) -> None:
        """A model worker ends, and its batcher has collected its exit."""
        self.tell_progress(process)
        if process not in self.processes:
            return  # it has left by itself
        self.processes.remove(process)
        self.queue_again(process.handle.batches)
        for request in [each for each in process.running if each.segment.retired and each.is_open]:
            if request.begun_by:
                request.set_state(SlotState.RUNNING)
        if oom:
            self.note_oom(process, sum(request.is_open for request in process.running))
        process.running.clear()
        self.act(self.scheduler.worker_gone(process.handle, oom, self.now))

    def settle(self) -> None:
        """The rest of a turn of the loop."""
        self.act(self.scheduler.dispatch(self.now))


class SchedulerMachine(Around):
    """What can happen."""

    @initialize(kinds=st.lists(MODELS, min_size=1, max_size=2, unique=True), are_short=st.booleans())
    def begin(self, kinds: list[int], are_short: bool) -> None:
        self.kinds = kinds
        for kind in kinds:
            self.act(self.scheduler.load_model(spec_of(kind), self.now))
            self.add_worker(kind)
        if are_short:
            self.batches_are_short()

    # -- web workers

    @precondition(lambda self: self.free)
    @rule(which=ANY, count=st.integers(1, 6), key=st.sampled_from("abc"), seen=st.sampled_from([True, True, False]))
    def submit(self, which: int, count: int, key: str, seen: bool) -> None:
        kind = self.kinds[which % len(self.kinds)]
        for _ in range(min(count, len(self.free))):
            segment, slot = self.free.pop()  # the one that was answered last, perhaps before its batch was done
            generation = (segment.states[slot] >> GENERATION_SHIFT) + 1
            segment.states[slot] = generation << GENERATION_SHIFT | SlotState.READY
            segment.cancels[slot] = 0
            has_sequence = "sequence_batching" in KINDS[kind]
            segment.keys[slot] = key if has_sequence else ""
            request = Request(segment, slot, generation, kind, segment.keys[slot], self.now)
            self.requests[id(segment), slot, generation] = request
            self.open.append(request)
            self.unseen.append(request)
        if seen:
            self.drain()

    @precondition(lambda self: self.unseen)
    @rule()
    def drain(self) -> None:
        """The loop reads the rings."""
        arrivals: dict[int, list[Request]] = {}
        for request in self.unseen:
            arrivals.setdefault(request.model, []).append(request)
        self.unseen = []
        for kind, requests in arrivals.items():
            for request in requests:
                request.set_state(SlotState.CLAIMED)
            jobs = [self.job(request) for request in requests]
            model, before = self.scheduler.models.get(kind), list(self.order[kind])
            self.order[kind] += requests
            tickets = sum(self.is_free(process) for process in self.processes if process.handle.model == kind)
            self.act(self.scheduler.arrived(kind, jobs, self.now))
            accepted = sum(request.is_open for request in requests)
            if model is None or not model.accepting:
                assert accepted == 0 or self.scheduler._recovered.are_kept(self.now)
            elif model.sequences is None:
                room = max(0, QUEUE - len(before))
                if kind == TICKETS:
                    room = min(room, max(0, tickets - len(before)))
                assert accepted == min(room, len(requests)), "a full queue refuses, one with room does not"
        self.settle()

    @precondition(lambda self: self.unseen)
    @rule()
    def damage_ring(self) -> None:
        """What was submitted is found by a scan, not in the ring."""
        found = [Found(self.job(request), request.model, SlotState.READY, bool(request.key)) for request in self.unseen]
        for request in self.unseen:
            request.set_state(SlotState.CLAIMED)
            self.order[request.model].append(request)
        self.unseen = []
        self.act(self.scheduler.recover(found, self.now))
        self.settle()

    def is_free(self, process: Process) -> bool:
        """Whether a worker has answered all that it has."""
        jobs = [job for batch in process.handle.batches for job in batch.jobs]
        return process.handle.takes_more and not any(self.request_of(job).is_open for job in jobs)

    def job(self, request: Request) -> Job:
        arrived_ns = int(request.arrived_at * 1e9)
        return Job(request.segment, request.slot, request.generation, arrived_ns, False, self.now)

    @precondition(lambda self: self.open)
    @rule(which=ANY)
    def hang_up(self, which: int) -> None:
        request = self.open[which % len(self.open)]
        request.cancelled = True
        request.segment.cancels[request.slot] = 1

    @precondition(lambda self: self.open and self.may_upheave)
    @rule(which=ANY)
    def end_web_worker(self, which: int) -> None:
        self.upheavals += 1
        segment = self.segments.pop(which % len(self.segments))
        self.free = [(each, slot) for each, slot in self.free if each is not segment]
        segment.retired = True
        in_flight = {
            self.request_of(job) for process in self.processes for each in process.handle.batches for job in each.jobs
        }
        self.unseen = [request for request in self.unseen if request.segment is not segment]
        for request in [request for request in self.open if request.segment is segment]:
            request.cancelled = True
            segment.cancels[request.slot] = 1
            if request not in in_flight:
                self.drop(request)
        self.scheduler.retire(segment)
        assert self.scheduler.is_in_flight(segment) == any(request.segment is segment for request in in_flight)
        self.add_segment()
        self.settle()

    # -- models and workers

    @precondition(lambda self: set(self.kinds) - set(self.scheduler.models))
    @rule(which=ANY)
    def load_model(self, which: int) -> None:
        kind = self.kinds[which % len(self.kinds)]
        if kind not in self.scheduler.models:
            let_in = [request for request in self.order[kind] if self.was_let_in(request)]
            self.order[kind].sort(key=lambda request: (request not in let_in, request.arrived_at))
            self.act(self.scheduler.load_model(spec_of(kind), self.now))
            assert all(request.is_open for request in let_in), "what an earlier batcher had let in is never refused"
            self.settle()

    def was_let_in(self, request: Request) -> bool:
        return any(
            found.state == SlotState.CLAIMED and self.request_of(found.job) is request
            for found in self.scheduler._recovered._found
        )

    @precondition(lambda self: self.scheduler.models and self.may_upheave)
    @rule(which=ANY)
    def unload_model(self, which: int) -> None:
        self.upheavals += 1
        kind = self.kinds[which % len(self.kinds)]
        self.act(self.scheduler.unload_model(kind, self.now))
        self.settle()

    @precondition(lambda self: len(self.processes) < 4)
    @rule(which=ANY)
    def start_worker(self, which: int) -> None:
        self.add_worker(self.kinds[which % len(self.kinds)])

    def add_worker(self, kind: int) -> None:
        self.next_worker += 1
        process = Process(Worker(self.next_worker, 1, kind))
        self.processes.append(process)
        self.act(self.scheduler.worker_ready(process.handle, self.now))
        self.settle()

    @precondition(lambda self: self.processes and self.may_lose_worker)
    @rule(which=ANY)
    def release_worker(self, which: int) -> None:
        self.losses += 1
        process = self.processes[which % len(self.processes)]
        self.act(self.scheduler.release_worker(process.handle, self.now))
        if process in self.processes:
            process.asked_to_leave = not process.handle.held
        self.settle()

    @precondition(lambda self: self.processes and self.may_lose_worker)
    @rule(which=ANY, oom=st.booleans())
    def end_worker(self, which: int, oom: bool) -> None:
        self.losses += 1
        self.kill(self.processes[which % len(self.processes)], oom)
        self.settle()

    @precondition(lambda self: self.with_a_batch())
    @rule(which=ANY)
    def replace_worker_that_has_not_begun(self, which: int) -> None:
        process = self.with_a_batch()[which % len(self.with_a_batch())]
        self.kill(process, oom=False)
        self.add_worker(process.handle.model)

    # -- what a model worker does

    @precondition(lambda self: self.with_a_batch())
    @rule(which=ANY)
    def take_batch(self, which: int) -> None:
        """A worker marks the requests of the next batch RUNNING; it looks at the cancel words as the batcher does."""
        process = self.with_a_batch()[which % len(self.with_a_batch())]
        process.begun += 1
        process.begun_at = self.now
        batch = process.posted[process.begun - 1]
        if process.begun not in process.revoked:
            self.run(process, batch)
        if self.joins(process) or process.begun in process.revoked:
            process.done = process.begun
            process.has_news = True

    def run(self, process: Process, batch: Batch) -> None:
        for request in map(self.request_of, list(batch.jobs)):
            if not request.is_open:
                continue
            assert not request.begun_by, "two handlers have it"
            request.executions += 1
            most = MOST_EXECUTIONS if request.model == REPEATS else 1
            assert request.executions <= most, "given to a handler too often (rule 3)"
            if self.is_over(request):
                self.answer(request, 499)
                continue
            request.begun_by = process.handle.worker_id
            request.set_state(SlotState.RUNNING)
            process.running.append(request)
        process.has_answered = False
        for request in process.running:
            request.together = len(process.running)

    def with_a_batch(self) -> list[Process]:
        """Workers that can begin one."""
        free = [each for each in self.processes if self.joins(each) or each.begun == each.done]
        return [each for each in free if each.begun < len(each.posted)]

    def joins(self, process: Process) -> bool:
        return "continuous_batching" in KINDS[process.handle.model]

    @precondition(lambda self: self.running())
    @rule(which=ANY, count=st.integers(1, 3))
    def answer_some(self, which: int, count: int) -> None:
        """A handler's answers are there; the worker has not said that the batch is done."""
        process = self.running()[which % len(self.running())]
        for request in process.running[:count]:
            self.answer(request, 200)
        del process.running[:count]
        process.has_answered = True
        process.has_news |= self.joins(process)

    def running(self) -> list[Process]:
        return [each for each in self.processes if each.running]

    @precondition(lambda self: self.in_a_batch())
    @rule(which=ANY)
    def finish_batch(self, which: int) -> None:
        process = self.in_a_batch()[which % len(self.in_a_batch())]
        for request in process.running:
            self.answer(request, 200)
        process.running.clear()
        process.done = process.begun
        process.has_news = True

    @precondition(lambda self: self.may_fail())
    @rule(which=ANY, oom=st.booleans())
    def fail_batch(self, which: int, oom: bool) -> None:
        """The handler fails: a request that was alone is answered, a batch given back."""
        process = self.may_fail()[which % len(self.may_fail())]
        if len(process.running) == 1:
            self.answer(process.running[0], 503)
        elif oom:
            process.oom = process.begun
        process.running.clear()
        process.done = process.begun
        process.has_news = True

    def may_fail(self) -> list[Process]:
        """Workers of the kind whose requests may run again, in the middle of a batch."""
        busy = [each for each in self.in_a_batch() if each.handle.model == REPEATS]
        return [each for each in busy if each.running and not each.has_answered]

    def in_a_batch(self) -> list[Process]:
        return [each for each in self.processes if not self.joins(each) and each.begun > each.done]

    @precondition(lambda self: any(each.handle.model == STREAMED_SEQUENCES for each in self.running()))
    @rule(which=ANY, key=st.sampled_from("abc"))
    def end_sequence(self, which: int, key: str) -> None:
        streaming = [each for each in self.running() if each.handle.model == STREAMED_SEQUENCES]
        process = streaming[which % len(streaming)]
        process.marks.append(mark_of(key))
        process.has_news = True

    @precondition(lambda self: self.processes)
    @rule()
    def work(self) -> None:
        """Every worker ends what it has begun, the loop looks, and every worker begins what it then has."""
        while self.in_a_batch():
            self.finish_batch(0)
        self.look_at_mailboxes()
        while self.with_a_batch():
            self.take_batch(0)

    @precondition(lambda self: any(each.has_news for each in self.processes))
    @rule()
    def look_at_mailboxes(self) -> None:
        for process in [each for each in self.processes if each.has_news]:
            if process.handle.batches:
                self.tell_progress(process)
        self.settle()

    # -- the batcher

    @rule(seconds=st.sampled_from([0.02, 0.3, 0.3, WINDOW_S, DEADLINE_S + 0.1, RECOVERY_S, RESPONSE_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.act(self.scheduler.tick(self.now))
        for process in [process for process in self.processes if process.handle.batches]:
            begun_at = 0.0 if self.joins(process) and not process.running else process.begun_at
            handle = process.handle
            self.act(self.scheduler.watch(handle, process.begun, process.done, begun_at, self.now))
        self.settle()
        for request in self.order[LATE] if LATE in self.scheduler.models else []:
            assert not self.is_over(request), "kept waiting after its deadline"

    @precondition(lambda self: self.stalled())
    @rule(which=ANY)
    def find_batch_slow(self, which: int) -> None:
        """A batch takes long, another one lies behind it, and there is a worker with nothing to do."""
        self.add_worker(self.stalled()[which % len(self.stalled())].handle.model)
        self.wait(0.6)

    def stalled(self) -> list[Process]:
        return [each for each in self.in_a_batch() if len(each.handle.batches) > 1]

    @precondition(lambda self: self.scheduler.models)
    @rule()
    def batches_are_short(self) -> None:
        """As if the models had answered a hundred batches in no time: the next batch lies ready while one runs."""
        for model in self.scheduler.models.values():
            if not model.joins_steps:
                model.service_s = 0.0001
        self.settle()

    @precondition(lambda self: self.open and self.may_upheave)
    @rule(is_told=st.booleans())
    def replace_batcher(self, is_told: bool) -> None:
        """The batcher dies, and its workers with it; the next one scans the segments, and is told of the models."""
        self.upheavals += 1
        self.processes.clear()
        self.scheduler = Scheduler(self.now, few=0)
        found = []
        for request in list(self.open):
            if request.segment.retired:
                self.drop(request)  # the supervisor does not name this segment any more
                continue
            found.append(Found(self.job(request), request.model, request.state, has_sequence=bool(request.key)))
            if request.state == SlotState.READY:
                request.set_state(SlotState.CLAIMED)
        self.unseen = []
        self.order = {kind: [] for kind in KINDS}
        for each in found:
            self.order[each.model].append(self.request_of(each.job))
        self.act(self.scheduler.recover(found, self.now))
        for request in self.open:
            assert not request.begun_by, "its worker is dead: it has to be answered"
        for which in range(len(self.kinds)) if is_told else ():
            self.load_model(which)

    # -- what always holds

    @invariant()
    def nothing_is_lost(self) -> None:
        held = [found.job for found in self.scheduler._recovered._found]
        in_flight = [job for worker in self.scheduler.busy for batch in worker.batches for job in batch.jobs]
        for model in self.scheduler.models.values():
            waiting: list[Job] = []
            model.jobs.drop(lambda job, waiting=waiting: bool(waiting.append(job)))  # type: ignore[misc]
            assert len(waiting) == len(model.jobs)
            held += waiting
        assert all(self.request_of(job).is_open for job in held), "nobody waits for this one"
        held += in_flight
        requests = Counter(request for request in map(self.request_of, held) if request.is_open)
        assert all(count == 1 for count in requests.values()), "held twice"
        assert set(requests) == set(self.open) - set(self.unseen)
        for process in self.processes:
            assert process.handle in self.scheduler.models[process.handle.model].workers
        workers = [worker for model in self.scheduler.models.values() for worker in model.workers if worker.batches]
        assert Counter(workers) == Counter(self.scheduler.busy)

    @invariant()
    def nobody_starves(self) -> None:
        """Whatever other models have to do, jobs that may go to a worker that may have them have gone."""
        for kind, model in self.scheduler.models.items():
            idle = [worker for worker in model.workers if not worker.batches and worker.takes_more]
            if model.sequences is not None:
                waiting = [each for each in model.sequences._live.values() if each.jobs]
                for worker in idle:
                    assert not any(each.worker in (None, worker.worker_id) for each in waiting)
                continue
            if not idle or not len(model.jobs):
                continue
            assert kind == FIXED, "jobs wait while a worker has nothing to do"
            assert len(model.jobs) < 3
            assert self.now < self.scheduler.wake_at <= self.now + WINDOW_S

    @invariant()
    def the_loop_is_woken(self) -> None:
        """By the end of a batch, where jobs wait for it; by submissions, where one could go to a worker at once."""
        wanted = self.scheduler.wanted_news()
        for model in self.scheduler.models.values():
            if len(model.jobs) or any(worker.leaving for worker in model.workers):
                assert wanted & News.COMPLETION
            if model.joins_steps or any(not worker.batches and worker.takes_more for worker in model.workers):
                assert wanted & News.SUBMISSION
        assert wanted

    @invariant()
    def streams_are_shared_evenly(self) -> None:
        model = self.scheduler.models.get(STREAMS)
        for worker in model.workers if model is not None and len(model.jobs) else []:
            mailbox_is_full = worker.posted - worker.done >= MAIL_PLACES
            assert not worker.takes_more or mailbox_is_full or worker.in_flight >= 3

    def teardown(self) -> None:
        """All models are unregistered, all workers released: everything has its answer, nobody is left."""
        for which in range(len(self.kinds)):
            self.unload_model(which)
        for process in list(self.processes):
            if process in self.processes:
                self.act(self.scheduler.release_worker(process.handle, self.now))
        self.drain()
        for _ in range(60):
            while self.with_a_batch():
                self.take_batch(0)
            while self.running():
                self.answer_some(0, 9)
            while self.in_a_batch():
                self.finish_batch(0)
            self.look_at_mailboxes()
            for process in [each for each in self.processes if each.to_be_killed]:
                self.kill(process, False)
            self.now += 0.2
            self.settle()
            if not self.processes:
                break
        self.now += RECOVERY_S
        self.act(self.scheduler.tick(self.now))
        self.settle()
        assert self.scheduler.models == {}
        assert not self.processes
        assert not self.open
        assert self.scheduler.wake_at == math.inf


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, report_multiple_bugs=False
)
TestScheduler = SchedulerMachine.TestCase


def test_rule_3_a_batch_that_fails_runs_again_in_halves_as_often_as_it_may() -> None:
    machine = SchedulerMachine()
    machine.begin([REPEATS], are_short=False)
    machine.submit(0, 1, "", seen=True)
    machine.take_batch(0)
    machine.submit(0, 4, "", seen=True)
    machine.finish_batch(0)
    machine.look_at_mailboxes()
    bad = machine.request_of(machine.scheduler.busy[0].batches[0].jobs[0])
    sizes = []
    while bad.is_open:
        machine.take_batch(0)
        (process,) = machine.processes
        sizes.append(len(process.running))
        machine.fail_batch(0, oom=False) if bad in process.running else machine.finish_batch(0)
        machine.look_at_mailboxes()
        machine.nothing_is_lost()
    assert sizes == [4, 2]
    assert (bad.answer, bad.executions) == (503, 2)
    while machine.open:
        machine.work()
    assert sorted(request.answer for request in machine.requests.values()) == [200, 200, 200, 503, 503]
    assert sorted(request.executions for request in machine.requests.values()) == [1, 2, 2, 2, 2]
    machine.teardown()


def test_a_worker_that_ran_out_of_memory_gets_smaller_batches_for_a_while() -> None:
    machine = SchedulerMachine()
    machine.begin([REPEATS], are_short=False)

    def begin_four() -> Process:
        """Four that came while the worker had something to do."""
        machine.submit(0, 1, "", seen=True)
        machine.take_batch(0)
        machine.submit(0, 4, "", seen=True)
        machine.finish_batch(0)
        machine.look_at_mailboxes()
        machine.take_batch(0)
        return machine.processes[0]

    assert len(begin_four().running) == 4
    machine.fail_batch(0, oom=True)
    machine.look_at_mailboxes()
    while machine.open:
        machine.work()
    for size in (2, 4):
        assert len(begin_four().running) == size
        while machine.open:
            machine.work()
        machine.now += REMEMBERED_S
    machine.teardown()


def test_rule_10_a_batch_behind_a_slow_one_goes_to_an_idle_worker() -> None:
    machine = SchedulerMachine()
    machine.begin([PLAIN], are_short=True)
    for count in (4, 2):  # one batch of three, and one that lies ready behind it
        machine.submit(0, count, "", seen=True)
    machine.take_batch(0)
    slow = machine.processes[0]
    assert [len(batch.jobs) for batch in slow.handle.batches] == [3, 3]
    machine.find_batch_slow(0)
    idle = machine.processes[1]
    assert [len(process.handle.batches[-1].jobs) for process in (slow, idle)] == [0, 3]
    machine.nothing_is_lost()
    machine.take_batch(0)
    machine.work()
    machine.nothing_is_lost()
    assert not machine.open
    machine.teardown()


def test_rule_10_all_batches_behind_a_slow_one_are_taken_back_and_keep_their_order() -> None:
    machine = SchedulerMachine()
    machine.begin([ALONE], are_short=True)
    for count in (3, 3):
        machine.submit(0, count, "", seen=True)
    machine.take_batch(0)
    slow = machine.processes[0]
    assert [len(batch.jobs) for batch in slow.handle.batches] == [1] * 6
    behind = [batch.jobs[0] for batch in slow.handle.batches[1:]]
    machine.find_batch_slow(0)
    idle = machine.processes[1]
    assert [len(batch.jobs) for batch in slow.handle.batches] == [1, 0, 0, 0, 0, 0]
    assert [batch.jobs[0] for batch in idle.handle.batches] == behind
    machine.nothing_is_lost()
    while machine.open:
        machine.work()
    machine.teardown()
