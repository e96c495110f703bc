"""The worker pool: every path of a worker's life, with a clock of the test's own."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wsgi_ts.batcher.pool.actions import (
    Action,
    Cause,
    StartTemplate,
    StartWorker,
    WorkerGone,
    WorkerReady,
)
from wsgi_ts.batcher.pool.life import BACKOFF_S, STABLE_S
from wsgi_ts.batcher.pool.pool import EXIT_GRACE_S, KILL_REPEAT_S, TEMPLATE_TIMEOUT_S, WorkerPool
from wsgi_ts.messages import (
    FromTemplate,
    KillWorker,
    ModelSpec,
    ModelUnloaded,
    ReleaseWorker,
    TemplateReady,
    TemplateStarted,
    WantedWorker,
    WorkerExited,
    WorkerLoaded,
    WorkerReport,
    WorkerStarted,
)


def make_spec(index: int = 3, **fields: Any) -> ModelSpec:
    limits = {"startup_timeout_s": 20.0, "response_timeout_s": 10.0, "max_retry_timeout_s": 300.0}
    return ModelSpec(index, "probe", "1.0", "/models/probe", "service.py", None, **{**limits, **fields})


class Driver:
    """A pool, its clock, and shorthand for what a template tells it. Keeps the actions of the last call."""

    def __init__(self, template_is_ready: bool = True, **spec_fields: Any) -> None:
        self.now = 1000.0
        self.pool = WorkerPool(wall_ms=lambda: 1_700_000_000_000)
        self.actions: list[Action] = self.pool.start(self.now)
        self.pool.set_model(make_spec(**spec_fields))
        if template_is_ready:
            self.event(TemplateReady())

    def event(self, event: FromTemplate) -> list[Action]:
        self.actions = self.pool.on_template_event(event, self.now)
        return self.actions

    def set_workers(self, *worker_ids: int) -> list[Action]:
        self.actions = self.pool.set_workers(3, [WantedWorker(worker_id) for worker_id in worker_ids], self.now)
        return self.actions

    def started(self, worker_id: int = 9000, start_count: int = 1) -> list[Action]:
        return self.event(WorkerStarted(worker_id, start_count, worker_id * 10))

    def loaded(self, status: int = 200, worker_id: int = 9000, start_count: int = 1) -> list[Action]:
        return self.event(WorkerLoaded(worker_id, start_count, status, "no weights", 42))

    def exited(
        self, code: int | None = None, signal: str | None = None, worker_id: int = 9000, start_count: int = 1
    ) -> list[Action]:
        return self.event(WorkerExited(worker_id, start_count, worker_id * 10, code, signal, ["Bye"]))

    def make_ready(self, *worker_ids: int) -> None:
        self.set_workers(*worker_ids)
        for worker_id in worker_ids:
            self.started(worker_id)
            self.loaded(worker_id=worker_id)

    def wait(self, seconds: float) -> list[Action]:
        self.now += seconds
        self.actions = self.pool.tick(self.now)
        return self.actions

    def only(self, kind: type[Any]) -> Any:
        (action,) = [action for action in self.actions if isinstance(action, kind)]
        return action

    @property
    def report(self) -> WorkerReport:
        report: WorkerReport = self.only(WorkerReport)
        return report

    def has(self, kind: type[Any]) -> bool:
        return any(isinstance(action, kind) for action in self.actions)


def test_a_worker_starts_loads_and_is_ready() -> None:
    driver = Driver()
    driver.set_workers(9000)
    assert driver.only(StartWorker) == StartWorker(9000, 1, make_spec(), None)
    assert (driver.report.state, driver.report.started_at_ms) == ("starting", 1_700_000_000_000)
    driver.started()
    assert (driver.report.state, driver.report.pid) == ("loading", 90000)
    driver.loaded()
    assert driver.only(WorkerReady) == WorkerReady(9000, 3, 1)
    report = driver.report
    assert (report.state, report.load_status, report.load_ms, report.restarts) == ("ready", 200, 42, 0)
    assert driver.pool.next_wake_at == math.inf


def test_workers_wait_for_the_template() -> None:
    driver = Driver(template_is_ready=False)
    assert driver.actions == [StartTemplate()]
    driver.set_workers(9000, 9001)
    assert not driver.has(StartWorker)
    assert [action.state for action in driver.actions if isinstance(action, WorkerReport)] == ["starting"] * 2
    driver.event(TemplateReady())
    starts = [action for action in driver.actions if isinstance(action, StartWorker)]
    assert [(start.worker_id, start.start_count) for start in starts] == [(9000, 1), (9001, 1)]


def test_workers_that_need_nothing_imported_beforehand_do_not_wait_for_it() -> None:
    driver = Driver(template_is_ready=False)
    driver.pool.set_model(make_spec(index=4, needs_preloaded=False))
    driver.set_workers(9000)
    driver.pool.set_workers(4, [WantedWorker(9001)], driver.now)
    driver.event(TemplateStarted())
    assert driver.only(StartWorker).worker_id == 9001
    driver.actions = driver.pool.set_workers(4, [WantedWorker(9001), WantedWorker(9002)], driver.now)
    assert driver.only(StartWorker).worker_id == 9002
    driver.event(TemplateReady())
    assert driver.only(StartWorker).worker_id == 9000


def test_a_template_that_hangs_takes_along_what_it_has_started() -> None:
    driver = Driver(template_is_ready=False, needs_preloaded=False)
    driver.event(TemplateStarted())
    driver.make_ready(9000)
    driver.wait(TEMPLATE_TIMEOUT_S)
    assert driver.only(WorkerGone) == WorkerGone(9000, 1, "died")
    assert driver.actions[-1] == StartTemplate()
    assert not driver.has(StartWorker)
    driver.event(TemplateStarted())
    assert driver.only(StartWorker).start_count == 2


def test_set_workers_stops_what_is_not_wanted_after_its_batch() -> None:
    driver = Driver()
    driver.make_ready(9000, 9001)
    assert driver.set_workers(9000) == [ReleaseWorker(9001, 1)]
    driver.actions = driver.pool.worker_released(9001, 1, driver.now)
    assert driver.actions == []
    driver.exited(code=0, worker_id=9001)
    assert driver.only(WorkerGone) == WorkerGone(9001, 1, "stopped")
    assert driver.report.state == "stopped"
    assert not driver.pool.idle


def test_a_released_worker_that_does_not_leave_is_killed() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.set_workers()
    driver.pool.worker_released(9000, 1, driver.now)
    assert driver.wait(EXIT_GRACE_S - 0.1) == []
    assert driver.wait(0.1) == [KillWorker(9000, 1)]
    assert driver.wait(KILL_REPEAT_S) == [KillWorker(9000, 1)]
    driver.exited(signal="SIGKILL")
    assert driver.only(WorkerGone).cause == "stopped"
    assert driver.pool.idle


def test_a_worker_that_is_never_released_is_killed_in_the_end() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.set_workers()
    assert driver.wait(driver.pool.next_wake_at - driver.now) == [KillWorker(9000, 1)]
    driver.exited(signal="SIGKILL")
    assert driver.only(WorkerGone).cause == "died"
    assert driver.report.exit_reason == "no answer within 10 s"


def test_a_worker_that_leaves_before_the_release_was_seen_has_stopped() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.set_workers()
    driver.exited(code=0)
    assert driver.only(WorkerGone).cause == "stopped"


def test_a_worker_that_crashes_in_its_last_batch_has_died() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.set_workers()
    driver.exited(signal="SIGSEGV")
    assert driver.only(WorkerGone).cause == "died"
    assert (driver.report.state, driver.report.exit_reason) == ("stopped", "killed by SIGSEGV")


def test_a_loading_worker_that_is_not_wanted_is_killed_at_once() -> None:
    driver = Driver()
    driver.set_workers(9000)
    driver.started()
    assert driver.set_workers() == [KillWorker(9000, 1)]
    assert not driver.loaded()  # too late
    driver.exited(signal="SIGKILL")
    assert driver.only(WorkerGone).cause == "stopped"
    assert driver.report.state == "stopped"


def test_a_worker_wanted_again_while_it_stops_is_started_again() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.set_workers()
    assert driver.set_workers(9000) == []
    driver.exited(code=0)
    assert driver.only(StartWorker).start_count == 2


@pytest.mark.parametrize(
    ("code", "signal", "cause", "reason"),
    [
        (0, None, "died", "exit code 0"),
        (3, None, "died", "exit code 3"),
        (None, "SIGSEGV", "died", "killed by SIGSEGV"),
        (None, "SIGKILL", "oom", "out of memory (killed by SIGKILL)"),
        (137, None, "oom", "out of memory (exit code 137)"),
    ],
)
def test_a_death_is_followed_by_a_start_one_second_later(
    code: int | None, signal: str | None, cause: Cause, reason: str
) -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.exited(code, signal)
    assert driver.only(WorkerGone) == WorkerGone(9000, 1, cause)
    report = driver.report
    assert (report.state, report.exit_reason, report.pid) == ("backoff", reason, -1)
    assert (report.recovering_since, report.last_lines, report.load_status) == (driver.now, ["Bye"], 200)
    assert driver.pool.next_wake_at == driver.now + 1
    assert driver.wait(0.9) == []
    driver.wait(0.1)
    assert driver.only(StartWorker).start_count == 2


def test_a_worker_that_had_served_for_a_while_comes_back_at_once() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.now += STABLE_S
    driver.exited(signal="SIGSEGV")
    assert driver.report.state == "backoff"
    assert driver.pool.next_wake_at <= driver.now
    driver.wait(0)
    assert driver.only(StartWorker).start_count == 2
    # Only once: the new life has not served at all.
    driver.started(start_count=2)
    driver.exited(code=1, start_count=2)
    assert driver.pool.next_wake_at == driver.now + BACKOFF_S[1]


def test_back_off_follows_torchserve_and_begins_again_after_a_load() -> None:
    driver = Driver()
    driver.set_workers(9000)
    delays = []
    for start_count in range(1, 8):
        driver.started(start_count=start_count)
        driver.exited(code=1, start_count=start_count)
        delays.append(driver.pool.next_wake_at - driver.now)
        driver.wait(delays[-1])
    assert delays == list(BACKOFF_S[:7]) == [1, 1, 2, 3, 5, 8, 13]
    driver.started(start_count=8)
    driver.loaded(start_count=8)
    assert (driver.report.recovering_since, driver.report.restarts) == (0.0, 7)
    driver.exited(code=1, start_count=8)
    assert driver.pool.next_wake_at == driver.now + 1


def test_a_worker_is_given_up_after_the_retry_time() -> None:
    driver = Driver(max_retry_timeout_s=5.0)
    driver.set_workers(9000)
    first_failure = driver.now
    start_count = 0
    while driver.has(StartWorker):
        start_count += 1
        driver.started(start_count=start_count)
        driver.exited(code=1, start_count=start_count)
        if driver.report.state == "backoff":
            driver.wait(driver.pool.next_wake_at - driver.now)
    assert (driver.report.state, start_count) == ("failed", 5)  # after 0, 1, 2, 4 and 7 seconds
    assert driver.report.recovering_since == first_failure
    assert driver.pool.next_wake_at == math.inf
    assert driver.pool.idle
    driver.set_workers()
    assert driver.report.state == "stopped"


@pytest.mark.parametrize(("status", "cause"), [(500, "died"), (507, "oom")])
def test_a_load_that_fails_is_told_with_its_status_when_the_worker_is_gone(status: int, cause: str) -> None:
    driver = Driver()
    driver.set_workers(9000)
    driver.started()
    assert driver.loaded(status) == []
    driver.exited(code=1)
    assert driver.only(WorkerGone).cause == cause
    report = driver.report
    assert (report.state, report.load_status, report.last_lines) == ("backoff", status, ["Bye"])
    assert "the model could not be loaded: no weights" in report.exit_reason


def test_a_worker_that_stays_after_a_failed_load_is_killed() -> None:
    driver = Driver()
    driver.set_workers(9000)
    driver.started()
    driver.loaded(500)
    assert driver.wait(EXIT_GRACE_S) == [KillWorker(9000, 1)]
    driver.exited(signal="SIGKILL")
    assert driver.only(WorkerGone).cause == "died"


@pytest.mark.parametrize(("code", "signal", "status"), [(1, None, 500), (None, "SIGKILL", 507)])
def test_a_death_while_loading_has_a_load_status(code: int | None, signal: str | None, status: int) -> None:
    driver = Driver()
    driver.set_workers(9000)
    driver.started()
    driver.exited(code, signal)
    assert driver.report.load_status == status


def test_startup_timeout(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver()
    driver.set_workers(9000)
    driver.started()
    assert driver.wait(19.9) == []
    assert driver.wait(0.1) == [KillWorker(9000, 1)]
    driver.exited(signal="SIGKILL")
    assert driver.only(WorkerGone).cause == "died"
    report = driver.report
    assert (report.state, report.load_status) == ("backoff", 408)
    assert report.exit_reason == "did not load the model within 20 s"
    assert (
        "Backend worker error\n"
        "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker did not respond in given time\n"
    ) in caplog.text


def test_response_timeout() -> None:
    driver = Driver()
    driver.make_ready(9000)
    assert driver.pool.worker_timed_out(9000, 2, driver.now) == []  # another life
    assert driver.pool.worker_timed_out(9000, 1, driver.now) == [KillWorker(9000, 1)]
    driver.exited(signal="SIGKILL")
    assert driver.only(WorkerGone).cause == "died"
    report = driver.report
    assert (report.state, report.exit_reason, report.load_status) == ("backoff", "no answer within 10 s", 200)


def test_a_start_without_memory_is_a_failure() -> None:
    driver = Driver()
    driver.set_workers(9000)
    driver.actions = driver.pool.worker_not_started(9000, 1, "/dev/shm is full", driver.now)
    assert driver.only(WorkerGone).cause == "oom"
    assert (driver.report.load_status, driver.report.exit_reason) == (507, "/dev/shm is full")
    driver.wait(1)
    assert driver.has(StartWorker)


def test_a_process_that_cannot_be_made_is_a_failure() -> None:
    driver = Driver()
    driver.set_workers(9000)
    driver.exited()
    assert driver.report.exit_reason == "the process could not be started"
    assert driver.report.load_status == 500


def test_events_of_an_earlier_life_are_ignored() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.exited(code=1)
    driver.wait(1)
    assert driver.started(start_count=1) == []
    assert driver.exited(code=1, start_count=1) == []
    assert driver.exited(code=1, worker_id=9999) == []


def test_the_template_takes_its_workers_along_and_they_come_back_at_once() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.set_workers(9000, 9001)
    driver.actions = driver.pool.on_template_lost(driver.now)
    gone = [action for action in driver.actions if isinstance(action, WorkerGone)]
    assert gone == [WorkerGone(9000, 1, "died"), WorkerGone(9001, 1, "died")]
    assert driver.actions[-1] == StartTemplate()
    reports = [action for action in driver.actions if isinstance(action, WorkerReport)]
    assert [(report.state, report.recovering_since) for report in reports] == [("starting", 0.0)] * 2
    assert reports[0].exit_reason == "the worker template died"
    driver.event(TemplateReady())
    starts = [action for action in driver.actions if isinstance(action, StartWorker)]
    assert [(start.worker_id, start.start_count) for start in starts] == [(9000, 2), (9001, 2)]


@pytest.mark.parametrize(("comes_up", "expected"), [(False, [0, 1, 1, 2, 3, 5]), (True, [0, 1, 1, 1, 1, 1])])
def test_a_template_that_keeps_dying_before_it_is_up_is_slowed_down(comes_up: bool, expected: list[int]) -> None:
    driver = Driver(template_is_ready=comes_up)
    delays = []
    for _ in range(6):
        driver.actions = driver.pool.on_template_lost(driver.now)
        lost_at = driver.now
        if not driver.has(StartTemplate):
            driver.wait(driver.pool.next_wake_at - driver.now)
        assert driver.has(StartTemplate)
        delays.append(driver.now - lost_at)
        if comes_up:
            driver.event(TemplateReady())
    assert delays == expected
    driver.event(TemplateReady())
    driver.wait(100)
    driver.actions = driver.pool.on_template_lost(driver.now)
    assert driver.has(StartTemplate)


def test_a_template_that_hangs_is_replaced_and_its_workers_fail() -> None:
    driver = Driver(template_is_ready=False)
    driver.set_workers(9000)
    driver.wait(TEMPLATE_TIMEOUT_S)
    assert driver.has(StartTemplate)
    assert (driver.report.state, driver.report.load_status) == ("backoff", 408)
    driver.wait(1)
    driver.event(TemplateReady())
    assert driver.has(StartWorker)


def test_a_removed_model_is_unloaded_when_its_last_worker_is_gone() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.set_workers(9000, 9001)
    driver.actions = driver.pool.remove_model(3, driver.now)
    assert driver.actions == [ReleaseWorker(9000, 1), KillWorker(9001, 1)]
    driver.exited(signal="SIGKILL", worker_id=9001)
    assert not driver.has(ModelUnloaded)
    driver.exited(code=0)
    assert driver.actions[-1] == ModelUnloaded(3)
    with pytest.raises(ValueError, match="model 3 is not loaded"):
        driver.set_workers(9000)


def test_a_model_without_workers_is_unloaded_at_once() -> None:
    driver = Driver()
    assert driver.pool.remove_model(3, driver.now) == [ModelUnloaded(3)]
    assert driver.pool.remove_model(77, driver.now) == [ModelUnloaded(77)]


def test_stop_ends_everything_and_starts_nothing() -> None:
    driver = Driver()
    driver.make_ready(9000)
    driver.make_ready(9000, 9001)
    driver.exited(code=1, worker_id=9001)
    driver.actions = driver.pool.stop(driver.now)
    assert driver.only(ReleaseWorker).worker_id == 9000
    assert driver.report.worker_id == 9001
    driver.exited(code=0)
    assert driver.pool.idle
    driver.actions = driver.pool.on_template_lost(driver.now)
    assert driver.actions == []
    assert driver.pool.next_wake_at == math.inf


def test_log_lines_are_torchserves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    driver = Driver()
    driver.make_ready(9000)
    driver.pool.worker_timed_out(9000, 1, driver.now)
    driver.exited(signal="SIGKILL")
    driver.wait(1)
    driver.started(start_count=2)
    driver.exited(code=1, start_count=2)
    driver.wait(1)
    driver.started(start_count=3)
    driver.loaded(start_count=3)
    expected = [
        "W-9000-probe_1.0 State change null -> WORKER_STARTED",
        "W-9000-probe_1.0 State change WORKER_STARTED -> WORKER_MODEL_LOADED",
        "Number or consecutive unsuccessful inference 1",
        "9000 Worker disconnected. WORKER_MODEL_LOADED",
        "W-9000-probe_1.0 State change WORKER_MODEL_LOADED -> WORKER_STOPPED",
        "Auto recovery start timestamp: 1700000000000",
        "Retry worker: 9000 in 1 seconds.",
        "Auto recovery failed again",
        "Auto recovery succeeded, reset recoveryStartTS",
    ]
    positions = [caplog.messages.index(line) for line in expected]
    assert positions == sorted(positions)
    assert {record.threadName for record in caplog.records} == {"W-9000-probe_1.0"}


class PoolMachine(RuleBasedStateMachine):
    """Any order of events: each life that was started ends exactly once, and what is wanted comes back."""

    @initialize()
    def begin(self) -> None:
        self.driver = Driver(max_retry_timeout_s=1e9)
        self.template_up = True
        self.wanted: set[int] = set()
        self.next_id = 9000
        self.alive: dict[int, int] = {}
        self.seen_gone: set[tuple[int, int]] = set()
        self.last_state: dict[int, str] = {}

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, StartWorker):
                assert self.template_up
                assert action.worker_id not in self.alive
                self.alive[action.worker_id] = action.start_count
            elif isinstance(action, WorkerGone):
                life = (action.worker_id, action.start_count)
                assert life not in self.seen_gone
                self.seen_gone.add(life)
                assert self.alive.pop(action.worker_id) == action.start_count
            elif isinstance(action, KillWorker | ReleaseWorker | WorkerReady):
                assert self.alive[action.worker_id] == action.start_count
            elif isinstance(action, WorkerReport):
                self.last_state[action.worker_id] = action.state

    @rule(data=st.data(), new=st.integers(0, 2))
    def scale(self, data: st.DataObject, new: int) -> None:
        """Keeps some workers (perhaps some that are just leaving) and adds new ones, under ids never used before."""
        known = sorted(self.wanted | self.alive.keys())
        kept = data.draw(st.sets(st.sampled_from(known))) if known else set()
        self.wanted = kept | set(range(self.next_id, self.next_id + new))
        self.next_id += new
        self.apply(self.driver.set_workers(*sorted(self.wanted)))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.apply(self.driver.wait(seconds))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), what=st.sampled_from(["started", "loaded", "failed", "exit", "kill", "release"]))
    def worker_does(self, data: st.DataObject, what: str) -> None:
        worker_id, count = data.draw(st.sampled_from(sorted(self.alive.items())))
        driver = self.driver
        if what == "started":
            self.apply(driver.started(worker_id, count))
        elif what in ("loaded", "failed"):
            self.apply(driver.loaded(200 if what == "loaded" else 500, worker_id, count))
        elif what == "exit":
            self.apply(driver.exited(data.draw(st.sampled_from([0, 1, 137])), None, worker_id, count))
        elif what == "kill":
            self.apply(driver.pool.worker_timed_out(worker_id, count, driver.now))
        else:
            self.apply(driver.pool.worker_released(worker_id, count, driver.now))

    @precondition(lambda self: self.template_up)
    @rule()
    def template_dies(self) -> None:
        self.template_up = False
        self.apply(self.driver.pool.on_template_lost(self.driver.now))

    @precondition(lambda self: not self.template_up)
    @rule()
    def template_comes_up(self) -> None:
        self.template_up = True
        self.apply(self.driver.event(TemplateReady()))

    @invariant()
    def idle_means_that_no_life_is_open(self) -> None:
        if hasattr(self, "alive"):
            assert self.driver.pool.idle == (not self.alive)

    def teardown(self) -> None:
        """Undisturbed, the pool reaches what is wanted."""
        if not hasattr(self, "alive"):
            return
        if not self.template_up:
            self.template_comes_up()
        for _ in range(50):
            for worker_id, count in sorted(self.alive.items()):
                if self.last_state[worker_id] == "ready" and worker_id in self.wanted:
                    continue
                if worker_id in self.wanted and self.last_state[worker_id] in ("starting", "loading"):
                    self.apply(self.driver.started(worker_id, count))
                    self.apply(self.driver.loaded(200, worker_id, count))
                if self.last_state[worker_id] != "ready" or worker_id not in self.wanted:
                    self.apply(self.driver.exited(0, None, worker_id, count))
            self.time_passes(2000.0)
        assert set(self.alive) == self.wanted


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase
