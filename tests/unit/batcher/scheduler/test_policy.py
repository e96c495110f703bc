"""The batching rules: each by itself, and against each other in a simulation."""

from __future__ import annotations

import pytest
from batching.comparison import CURVES, Outcome, fixed_rules, judge, run
from hypothesis import given, settings
from hypothesis import strategies as st

from wsgi_ts.batcher.scheduler.policy import (
    AdaptivePolicy,
    BatchCost,
    BatchPolicy,
    CloseReason,
    FixedPolicy,
    ReturningClients,
    make_policy,
)
from wsgi_ts.tracing.records import CLOSE_REASONS
from wsgi_ts.tune.simulation import WAKE_S, Load, Model, Rule, Simulation

GPU = Model(fixed_s=0.005, per_request_s=0.00005)
CPU = Model(fixed_s=0.002, per_request_s=0.002)
TINY = Model(fixed_s=0.0001, per_request_s=0.000005)


def simulate(
    policy: str, max_delay_s: float, model: Model, load: Load, requests: int = 3000, batch_size: int = 32
) -> Outcome:
    return run(Rule(policy, batch_size, max_delay_s), model, load, requests, warm_up=200)


def warmed_up(fixed_s: float, per_request_s: float, idle_s: float) -> AdaptivePolicy:
    """A policy that knows its model and that clients come back `idle_s` after their answer; none is awaited."""
    policy = AdaptivePolicy(max_delay_s=0.1)
    now = 0.0
    for turn in range(200):
        n = 1 + turn % 8
        policy.on_batch(n, fixed_s + per_request_s * n)
        policy.on_answered(now, n)
        now += idle_s
        policy.on_returned(now, n, idle_s)
        now += fixed_s
    return policy


WARMED_UP_FOR_S = 100.0  # later than anything `warmed_up` did


# -- making them


def test_make_policy_knows_the_three_names() -> None:
    assert isinstance(make_policy("adaptive", 0.1), AdaptivePolicy)
    assert isinstance(make_policy("fixed", 0.1), FixedPolicy)
    assert type(make_policy("none", 0.1)) is BatchPolicy


def test_make_policy_refuses_other_names_and_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="'eager' is none of adaptive, fixed, none"):
        make_policy("eager", 0.1)


def test_policies_show_what_they_have_learnt() -> None:
    assert repr(make_policy("fixed", 0.05)) == "<FixedPolicy max_delay 50 ms>"
    shown = repr(warmed_up(0.005, 0.001, 0.0005))
    assert "<BatchCost 5 ms + 1 ms * n>" in shown
    assert "idle 0.5 ms" in shown


# -- none


def test_none_never_waits() -> None:
    policy = make_policy("none", 0.1)
    policy.on_returned(1.0, 1, 0.001)
    assert policy.decide(1.0, 3, 1.0, 32) == 0.0


# -- fixed


def test_fixed_waits_the_whole_delay_even_for_a_lone_request() -> None:
    policy = FixedPolicy(0.1)
    assert policy.decide(10.0, 1, 10.0, 8) == pytest.approx(0.1)
    assert policy.decide(10.06, 2, 10.0, 8) == pytest.approx(0.04)
    assert policy.decide(10.1, 2, 10.0, 8) == 0.0


def test_fixed_sends_a_full_batch_at_once() -> None:
    assert FixedPolicy(0.1).decide(10.0, 8, 10.0, 8) == 0.0


def test_fixed_window_opens_when_the_worker_is_free_not_when_the_request_came() -> None:
    policy = FixedPolicy(0.1)
    assert policy.decide(15.0, 2, 10.0, 8) == pytest.approx(0.1)
    assert policy.decide(15.1, 2, 10.0, 8) == 0.0


def test_fixed_opens_a_new_window_for_each_batch() -> None:
    policy = FixedPolicy(0.1)
    policy.decide(10.0, 1, 10.0, 8)
    assert policy.decide(10.1, 1, 10.0, 8) == 0.0
    assert policy.decide(10.2, 1, 10.15, 8) == pytest.approx(0.1)


def test_fixed_opens_the_window_anew_when_those_who_opened_it_have_gone() -> None:
    policy = FixedPolicy(0.1)
    policy.decide(10.0, 1, 10.0, 8)
    # That request was cancelled; the next one comes much later.
    assert policy.decide(12.0, 1, 12.0, 8) == pytest.approx(0.1)


def test_fixed_with_batch_size_one_or_no_delay_never_waits() -> None:
    assert FixedPolicy(0.1).decide(10.0, 1, 10.0, 1) == 0.0
    assert FixedPolicy(0.0).decide(10.0, 1, 10.0, 8) == 0.0


# -- adaptive


def test_adaptive_sends_at_once_while_it_knows_nothing() -> None:
    policy = AdaptivePolicy(0.1)
    assert policy.decide(0.0, 1, 0.0, 32) == 0.0


def test_adaptive_waits_for_clients_that_are_about_to_return() -> None:
    policy = warmed_up(fixed_s=0.005, per_request_s=0.00005, idle_s=0.0005)
    now = WARMED_UP_FOR_S
    policy.on_answered(now, 8)
    policy.on_returned(now + 0.0004, 1, 0.0004)
    wait = policy.decide(now + 0.0004, 1, now + 0.0004, 32)
    # Seven more are expected within a few R = 0.5 ms; they are given up 4.5 R after their answer.
    assert 0.0 < wait <= 0.00225


def test_adaptive_sends_when_all_clients_are_back() -> None:
    policy = warmed_up(fixed_s=0.005, per_request_s=0.00005, idle_s=0.0005)
    now = WARMED_UP_FOR_S
    policy.on_answered(now, 8)
    policy.on_returned(now + 0.0005, 8, 0.0005)
    assert policy.decide(now + 0.0005, 8, now + 0.0005, 32) == 0.0


def test_adaptive_gives_up_clients_that_do_not_return() -> None:
    policy = warmed_up(fixed_s=0.005, per_request_s=0.00005, idle_s=0.0005)
    now = WARMED_UP_FOR_S
    policy.on_answered(now, 2)
    policy.on_returned(now + 0.0005, 1, 0.0005)
    wait = policy.decide(now + 0.0005, 1, now + 0.0005, 32)
    assert wait > 0.0
    assert policy.decide(now + 0.0005 + wait, 1, now + 0.0005, 32) == 0.0


def test_adaptive_does_not_wait_where_batching_saves_nothing() -> None:
    policy = warmed_up(fixed_s=0.0, per_request_s=0.005, idle_s=0.0005)
    now = WARMED_UP_FOR_S
    policy.on_answered(now, 8)
    assert policy.decide(now + 0.0001, 1, now + 0.0001, 32) == 0.0


def test_adaptive_does_not_wait_for_a_request_further_away_than_it_is_worth() -> None:
    policy = warmed_up(fixed_s=0.005, per_request_s=0.00005, idle_s=0.5)
    now = WARMED_UP_FOR_S * 10
    policy.on_answered(now, 2)
    assert policy.decide(now + 0.001, 1, now + 0.001, 32) == 0.0


def test_adaptive_never_waits_longer_than_max_delay() -> None:
    policy = AdaptivePolicy(max_delay_s=0.002)
    now = 0.0
    for _ in range(50):
        policy.on_batch(2, 1.0)
        policy.on_answered(now, 8)
        now += 0.1
        policy.on_returned(now, 8, 0.1)
    policy.on_answered(now, 100)
    assert policy.decide(now, 1, now, 32) == pytest.approx(0.002)
    assert policy.decide(now + 0.002, 1, now, 32) == 0.0


def test_adaptive_sends_a_full_batch_at_once() -> None:
    policy = warmed_up(fixed_s=0.005, per_request_s=0.00005, idle_s=0.0005)
    policy.on_answered(WARMED_UP_FOR_S, 100)
    assert policy.decide(WARMED_UP_FOR_S, 32, WARMED_UP_FOR_S, 32) == 0.0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["return", "answer", "batch", "decide"]),
            st.integers(min_value=1, max_value=64),
            st.floats(min_value=0.0, max_value=100.0, allow_subnormal=False),
        ),
        max_size=80,
    )
)
def test_adaptive_survives_any_history_and_never_exceeds_max_delay(steps: list[tuple[str, int, float]]) -> None:
    """Whatever it is told, in whatever order: no exception, and 0 <= wait <= max delay."""
    policy = AdaptivePolicy(max_delay_s=0.1)
    now = 0.0
    for what, count, seconds in steps:
        now += seconds / 1000
        if what == "return":
            policy.on_returned(now, count, seconds)
        elif what == "answer":
            policy.on_answered(now, count)
        elif what == "batch":
            policy.on_batch(count, seconds)
        else:
            assert 0.0 <= policy.decide(now, count, now, 32) <= 0.1 + 1e-9


# -- what the adaptive rule learns


def test_batch_cost_finds_both_parts_of_a_noiseless_cost() -> None:
    cost = BatchCost()
    for turn in range(100):
        n = 1 + turn % 16
        cost.observe(n, 0.004 + 0.0003 * n)
    assert cost.fixed_s == pytest.approx(0.004, rel=0.02)
    assert cost.per_request_s == pytest.approx(0.0003, rel=0.02)


def test_batch_cost_counts_all_as_fixed_until_the_size_has_varied() -> None:
    cost = BatchCost()
    for _ in range(50):
        cost.observe(1, 0.004)
    assert cost.fixed_s == pytest.approx(0.004)
    assert cost.per_request_s == 0.0


def test_batch_cost_keeps_what_it_has_learnt_while_the_size_stays_the_same() -> None:
    cost = BatchCost()
    for turn in range(100):
        n = 1 + turn % 16
        cost.observe(n, 0.002 + 0.002 * n)
    for turn in range(2000):
        cost.observe(8, (0.002 + 0.002 * 8) * (1.05 if turn % 2 else 0.95))
    assert cost.per_request_s == pytest.approx(0.002, rel=0.05)
    assert cost.fixed_s == pytest.approx(0.002, rel=0.6)


def test_batch_cost_follows_a_model_that_becomes_slower() -> None:
    cost = BatchCost()
    for turn in range(100):
        cost.observe(1 + turn % 4, 0.001)
    for turn in range(200):
        cost.observe(1 + turn % 4, 0.010)
    assert cost.fixed_s == pytest.approx(0.010, rel=0.05)


def test_batch_cost_is_never_negative_where_larger_batches_happen_to_be_faster() -> None:
    cost = BatchCost()
    for turn in range(100):
        n = 1 + turn % 4
        cost.observe(n, 0.010 - 0.002 * n)
    assert cost.per_request_s == 0.0
    assert cost.fixed_s > 0.0


def test_batch_cost_shrugs_off_one_batch_that_a_pause_fell_into() -> None:
    cost = BatchCost()
    for turn in range(100):
        n = 1 + turn % 8
        cost.observe(n, 0.005 + 0.001 * n)
    before = cost.fixed_s + cost.per_request_s
    cost.observe(4, 30.0)
    assert cost.fixed_s + cost.per_request_s < 3 * before


def test_returning_clients_learns_that_half_of_them_stay_away() -> None:
    clients = ReturningClients()
    now = 0.0
    for _ in range(300):
        clients.answered(now, 10)
        clients.returned(now + 0.001, 5, 0.001)
        now += 0.02
    clients.answered(now, 10)
    expected, given_up_at = clients.expected(now)
    assert 3.5 < expected < 6.5
    assert given_up_at == pytest.approx(now + 0.0045, rel=0.01)


def test_returning_clients_expects_none_before_one_has_ever_come_back() -> None:
    clients = ReturningClients()
    for turn in range(10_000):
        clients.answered(float(turn), 3)
    assert clients.expected(10_000.0)[0] == 0.0


def test_returning_clients_counts_a_steady_stream_right() -> None:
    """Each client is back 10 ms after its answer, a thousand a second: ten are under way at any time."""
    clients = ReturningClients()
    for turn in range(5_000):
        now = turn / 1000
        if turn >= 10:
            clients.returned(now, 1, 0.010)
        clients.answered(now, 1)
    expected, _ = clients.expected(5.0)
    assert 8.0 < expected < 12.0


def test_returning_clients_is_not_misled_by_one_long_absence() -> None:
    clients = ReturningClients()
    for turn in range(100):
        clients.answered(turn / 10, 1)
        clients.returned(turn / 10 + 0.001, 1, 0.001)
    clients.returned(20.0, 1, 600.0)
    assert clients.mean_idle_s < 0.002


# -- the rules against each other: the ordering that the adaptive rule was chosen for


def test_a_lone_client_never_waits() -> None:
    for model in (GPU, CPU, TINY):
        latencies_s = Simulation(Rule(), model, Load(clients=1)).latencies_s(3000, 200)
        # The batcher is woken, and then the worker; the batch takes up to 5 % more than it costs.
        assert max(latencies_s) <= 2 * WAKE_S + 1.05 * model.cost_s(1) + 1e-9, model


def test_a_lone_client_waits_in_vain_under_the_fixed_rule() -> None:
    adaptive = simulate("adaptive", 0.1, GPU, Load(clients=1))
    assert adaptive.throughput > 10 * simulate("fixed", 0.1, GPU, Load(clients=1)).throughput
    assert adaptive.throughput > 1.7 * simulate("fixed", 0.005, GPU, Load(clients=1)).throughput


@pytest.mark.parametrize("clients", [2, 8, 16])
def test_clients_in_step_gain_by_waiting_for_each_other(clients: int) -> None:
    adaptive = simulate("adaptive", 0.1, GPU, Load(clients=clients))
    none = simulate("none", 0.0, GPU, Load(clients=clients))
    fixed = simulate("fixed", 0.005, GPU, Load(clients=clients))
    assert adaptive.throughput > 1.3 * none.throughput
    assert adaptive.throughput > 1.3 * fixed.throughput
    assert adaptive.p50_s < none.p50_s


@pytest.mark.parametrize("model", [GPU, CPU, TINY], ids=["gpu", "cpu", "tiny"])
@pytest.mark.parametrize(
    "load",
    [
        Load(clients=1),
        Load(clients=4),
        Load(clients=32),
        Load(clients=48),
        Load(clients=64),
        Load(clients=16, think_s=0.005),
        Load(rate=100.0),
        Load(clients=8, rate=200.0),
    ],
    ids=lambda load: f"{load.clients}clients-{load.rate:g}rate",
)
def test_adaptive_is_within_a_few_percent_of_the_best_rule(model: Model, load: Load) -> None:
    adaptive = simulate("adaptive", 0.1, model, load)
    for policy, max_delay_s in (("none", 0.0), ("fixed", 0.005), ("fixed", 0.1)):
        other = simulate(policy, max_delay_s, model, load)
        assert adaptive.throughput > 0.96 * other.throughput, (policy, max_delay_s, other)


def test_open_loop_is_served_as_with_no_delay() -> None:
    adaptive = simulate("adaptive", 0.1, GPU, Load(rate=1000.0))
    assert adaptive.p50_s == pytest.approx(simulate("none", 0.0, GPU, Load(rate=1000.0)).p50_s, rel=0.02)


@pytest.mark.parametrize("model", CURVES, ids=["0.2+0.05n", "5+0.1n", "20+1n"])
@pytest.mark.parametrize("clients", [2, 32, 64])
def test_clients_get_the_throughput_and_the_p99_of_the_best_fixed_rule(model: Model, clients: int) -> None:
    load = Load(clients=clients)
    size = min(clients, 32)
    rules = fixed_rules({size, max(2, size // 2)}, (0.0, 1.0, 3.0, 7.0))
    fixed = {rule: run(rule, model, load, 5000, 500) for rule in rules}
    verdict = judge(fixed, run(Rule(), model, load, 5000, 1000))
    assert verdict.holds, verdict


@pytest.mark.parametrize("model", CURVES, ids=["0.2+0.05n", "5+0.1n", "20+1n"])
@pytest.mark.parametrize("part", [0.2, 0.7])
def test_requests_at_random_get_the_p99_of_the_best_fixed_rule(model: Model, part: float) -> None:
    """On connections of their own, and on kept ones, which look like clients that come back."""
    rate = part * model.capacity
    fixed = {rule: run(rule, model, Load(rate=rate), 5000, 500) for rule in fixed_rules({32}, (0.0, 1.0, 5.0))}
    del fixed[Rule("fixed", 1, 0.0)]  # cannot keep up
    for pool in (0, 16, 64):
        verdict = judge({**fixed}, run(Rule(), model, Load(rate=rate, pool=pool), 5000, 500))
        assert verdict.holds, (pool, verdict)


# -- why a batch has gone


def test_every_reason_has_a_name() -> None:
    numbers = [value for name, value in vars(CloseReason).items() if name.isupper()]
    assert sorted(numbers) == list(range(len(CLOSE_REASONS)))
    assert CLOSE_REASONS[CloseReason.FULL] == "full"


def test_the_rule_without_delay_says_full_or_that_it_never_waits() -> None:
    policy = make_policy("none", 0.1)
    policy.decide(0.0, 8, 0.0, 8)
    assert policy.reason == CloseReason.FULL
    policy.decide(0.0, 7, 0.0, 8)
    assert policy.reason == CloseReason.NO_WAIT


def test_fixed_says_full_or_delay() -> None:
    policy = FixedPolicy(0.1)
    policy.decide(10.0, 8, 10.0, 8)
    assert policy.reason == CloseReason.FULL
    policy.decide(10.0, 2, 10.0, 8)
    policy.decide(10.1, 2, 10.0, 8)
    assert policy.reason == CloseReason.DELAY


def test_adaptive_says_which_of_its_conditions_has_ended_the_wait() -> None:
    policy = warmed_up(fixed_s=0.005, per_request_s=0.00005, idle_s=0.0005)
    now = WARMED_UP_FOR_S
    policy.decide(now, 32, now, 32)
    assert policy.reason == CloseReason.FULL
    policy.on_answered(now, 8)
    assert policy.decide(now, 1, now, 32) > 0.0
    policy.decide(now + 0.3, 1, now, 32)
    assert policy.reason == CloseReason.DELAY
    policy.decide(now + 0.4, 1, now + 0.4, 32)
    assert policy.reason == CloseReason.IDLE
    rare = warmed_up(fixed_s=0.005, per_request_s=0.00005, idle_s=0.5)
    now = WARMED_UP_FOR_S * 10
    rare.on_answered(now, 2)
    rare.decide(now + 0.001, 1, now + 0.001, 32)
    assert rare.reason == CloseReason.ADAPTIVE
