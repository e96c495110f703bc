"""When a batch goes: the three batching rules, free of clocks, sockets and threads.

Owns: what one model version's queue has learnt of its clients and of its model.
Runs in: the batcher's loop, which passes in the time and asks `decide` whenever a model worker is free.

The adaptive rule waits only for clients that are on their way back: k of them were answered lately, are not here again
yet, and are likely to come, R seconds after their answer on average. n requests wait for a free worker. A batch of n
costs S(n) = a + b*n seconds. The batch waits as long as one of these holds:

    R/k * n            <  0.4 * a                  the next one pays
    R * (1 + ln k)     <  0.5 * a * (1 + k/(n+k))  all of them together pay, and there is room for them

The first: the next client is back after R/k, n requests wait that long for it, and it saves the fixed cost once. The
second: the last of k is back after about R * (1 + ln k), and then a is saved for k of n + k requests; and nobody comes
just after the batch has begun and waits for all of it, which is what the slowest answers consist of. Without it the
last few clients would be left behind, since each of them alone is not worth the wait of all others.

Requests that come independently of answers (an open loop, over kept connections too) gather while a batch runs anyway:
there R is long beside a, or k large, and next to nothing waits. With nobody to wait for the batch goes at once, so a
lone client never waits. The factors were found by simulation.
"""

from __future__ import annotations

from collections import deque
from math import log
from typing import Final

ADAPTIVE = "adaptive"
FIXED = "fixed"
NONE = "none"


class CloseReason:
    """Why a batch went as it was: what its trace and the metrics say of it.

    Constants and no enum, as in `shm.layout`: one is decided for every batch. `tracing.records.CLOSE_REASONS` has their
    names.
    """

    UNKNOWN: Final = 0  # what its worker was given by a batcher that has died since
    FULL: Final = 1  # no room for more
    DELAY: Final = 2  # maxBatchDelay of its oldest request was over
    IDLE: Final = 3  # nobody else was expected
    ADAPTIVE: Final = 4  # others were expected, and not worth the wait
    NO_WAIT: Final = 5  # the model never waits: batchPolicy none, or tickets
    JOINED: Final = 6  # its requests joined those under way: continuous batches, asynchronous handlers
    SEQUENCE: Final = 7  # the next requests of its sequences
    PLUGIN: Final = 8  # a batching plugin said so
    SUSPECT: Final = 9  # cut down to the requests that may be to blame for a failure: a worker's end, or a failed batch


class BatchPolicy:
    """A batching rule: what the batcher tells it, and what it asks. This one: no delay, whatever waits goes at once.

    All times are seconds on one monotonic clock. One instance serves one model version.

    Attributes:
        reason: why the last batch went for which `decide` has said "now"; a `CloseReason`.
    """

    def __init__(self) -> None:
        self.reason: int = CloseReason.NO_WAIT

    def on_returned(self, arrived_at: float, count: int, idle_s: float) -> None:
        """Clients whose connections had an answer before have sent their next requests.

        They arrived at `arrived_at` on average, which may be a while ago, and `idle_s` after their last answers.
        """

    def on_answered(self, now: float, count: int) -> None:
        """The answers of `count` requests have left: their clients may come back."""

    def on_batch(self, n: int, service_s: float) -> None:
        """A batch of `n` requests has kept a model worker busy for `service_s` seconds."""

    def decide(self, now: float, waiting: int, oldest_at: float, batch_size: int) -> float:
        """Whether the waiting requests go to the free worker now.

        Args:
            now: the present time.
            waiting: requests in the queue, at least 1.
            oldest_at: when the first of them came.
            batch_size: the most that one batch may hold.

        Returns:
            0.0 for "now", else the seconds after which to ask again if nothing else happens before.
        """
        self.reason = CloseReason.FULL if waiting >= batch_size else CloseReason.NO_WAIT
        return 0.0

    def cost(self) -> tuple[float, float]:
        """What it has learnt of what a batch costs: seconds, and seconds for each request; (0.0, 0.0) for nothing."""
        return 0.0, 0.0

    def __repr__(self) -> str:
        return "<BatchPolicy none>"


def make_policy(name: str, max_delay_s: float) -> BatchPolicy:
    """The rule called `name` in a model's `batchPolicy` setting.

    Raises:
        ValueError: no rule has that name.
    """
    if name == ADAPTIVE:
        return AdaptivePolicy(max_delay_s)
    if name == FIXED:
        return FixedPolicy(max_delay_s)
    if name == NONE:
        return BatchPolicy()
    raise ValueError(f"batchPolicy: {name!r} is none of {ADAPTIVE}, {FIXED}, {NONE}")


class FixedPolicy(BatchPolicy):
    """TorchServe's rule: from when a free worker finds the first request, wait `max_delay_s` or until full.

    The window opens when the worker is free and not when the request came, as in TorchServe, where a worker takes
    the first request and only then starts to count.
    """

    def __init__(self, max_delay_s: float) -> None:
        super().__init__()
        self._max_delay_s = max_delay_s
        self._opened_at = -1.0

    def decide(self, now: float, waiting: int, oldest_at: float, batch_size: int) -> float:
        """Now when full or when the window is over, else the rest of the window."""
        if self._opened_at < 0.0:
            self._opened_at = now
        # Those that opened the window may all have been cancelled: then the next request opens it anew.
        remaining = max(self._opened_at, oldest_at) + self._max_delay_s - now
        if waiting < batch_size and remaining > _NO_TIME_S:
            return remaining
        self._opened_at = -1.0
        self.reason = CloseReason.FULL if waiting >= batch_size else CloseReason.DELAY
        return 0.0

    def __repr__(self) -> str:
        return f"<FixedPolicy max_delay {self._max_delay_s * 1e3:g} ms>"


#: A wait shorter than this is over before it begins.
_NO_TIME_S = 1e-6


class AdaptivePolicy(BatchPolicy):
    """Waits for clients that are on their way back while that pays (see the module's text)."""

    def __init__(self, max_delay_s: float) -> None:
        super().__init__()
        self._max_delay_s = max_delay_s
        self._clients = ReturningClients()
        self._cost = BatchCost()

    def on_returned(self, arrived_at: float, count: int, idle_s: float) -> None:
        """Learns R, and that they are no longer awaited."""
        self._clients.returned(arrived_at, count, idle_s)

    def on_answered(self, now: float, count: int) -> None:
        """From now on these clients may come back."""
        self._clients.answered(now, count)

    def on_batch(self, n: int, service_s: float) -> None:
        """Learns a and b."""
        self._cost.observe(n, service_s)

    def cost(self) -> tuple[float, float]:
        """The parts a and b of S(n)."""
        return self._cost.fixed_s, self._cost.per_request_s

    def decide(self, now: float, waiting: int, oldest_at: float, batch_size: int) -> float:
        """Now when full, late, or when the next request is further away than it is worth."""
        if waiting >= batch_size:
            self.reason = CloseReason.FULL
            return 0.0
        remaining = oldest_at + self._max_delay_s - now
        if remaining <= _NO_TIME_S:
            self.reason = CloseReason.DELAY
            return 0.0
        expected, next_change_at = self._clients.expected(now)
        if not expected or not self._is_worth_it(waiting, expected, batch_size - waiting):
            self.reason = CloseReason.ADAPTIVE if expected else CloseReason.IDLE
            return 0.0
        # Nothing in the rule changes with time alone but the clients that are given up: look again then.
        next_change = next_change_at - now
        if next_change < _NO_TIME_S:
            return _NO_TIME_S
        return next_change if next_change < remaining else remaining

    def _is_worth_it(self, waiting: int, expected: float, room: int) -> bool:
        """Whether to wait for the next of `expected` clients, or for all if there is `room` for them."""
        mean_idle_s, fixed_s = self._clients.mean_idle_s, self._cost.fixed_s
        if mean_idle_s * waiting < 0.4 * fixed_s * expected:
            return True
        if expected > room:
            return False
        until_all_s = mean_idle_s * (1.0 + log(expected) if expected > 1.0 else 1.0 / expected)
        return until_all_s < 0.5 * fixed_s * (1.0 + expected / (waiting + expected))

    def __repr__(self) -> str:
        return f"<AdaptivePolicy max_delay {self._max_delay_s * 1e3:g} ms {self._cost} {self._clients}>"


class ReturningClients:
    """How many answered clients are likely to send their next request, and how soon.

    Clients answered close together are kept as one group, and groups are few, so the work per call is bounded.
    """

    #: A client not back after this many mean idle times is given up. With fewer, one in fifty of those whose times are
    #: spread exponentially would be, and each of them waits for a whole batch.
    _PATIENCE = 4.5
    #: Answers within this part of the mean idle time of each other are one group.
    _GROUPS_PER_IDLE = 8.0
    #: Groups kept at most. 36 is what patience and grouping bring about once R is known; before that, and while R
    #: shrinks, the oldest are forgotten, which says nothing about their clients.
    _MOST_GROUPS = 48
    #: What one return counts in the mean idle time, and one return or give-up in the share that comes back.
    _IDLE_WEIGHT = 0.05
    _SHARE_WEIGHT = 0.02
    #: One client that went away for lunch counts as this many mean idle times at most.
    _LONGEST = 8.0

    def __init__(self) -> None:
        self.mean_idle_s = 0.0
        self._share = 0.5
        self._groups: deque[list[float]] = deque()  # [answered at, clients not back yet], oldest first
        self._awaited = 0.0  # the sum of the groups' clients

    def answered(self, now: float, count: int) -> None:
        """`count` clients have their answer."""
        groups = self._groups
        if groups and now - groups[-1][0] <= self.mean_idle_s / self._GROUPS_PER_IDLE:
            groups[-1][1] += count
        else:
            groups.append([now, float(count)])
            if len(groups) > self._MOST_GROUPS:
                self._awaited -= groups.popleft()[1]
        self._awaited += count

    def returned(self, arrived_at: float, count: int, idle_s: float) -> None:
        """`count` clients are back, at `arrived_at`, each after `idle_s` seconds on average."""
        mean = self.mean_idle_s
        if mean:
            weight = 1.0 - (1.0 - self._IDLE_WEIGHT) ** count
            self.mean_idle_s = mean + weight * (min(idle_s, self._LONGEST * mean) - mean)
        else:
            self.mean_idle_s = max(idle_s, _NO_TIME_S)
        self._share = 1.0 - (1.0 - self._share) * (1.0 - self._SHARE_WEIGHT) ** count
        self._take_out(arrived_at - idle_s, float(count))
        # Also here, not only in `expected`: a queue that is always full never asks for it.
        patience_s = self._PATIENCE * self.mean_idle_s
        if self._groups and self._groups[0][0] + patience_s <= arrived_at:
            self._give_up(arrived_at - patience_s)

    def expected(self, now: float) -> tuple[float, float]:
        """How many clients are likely to come back, and when the next group of them is given up.

        Returns:
            (expected number, time in seconds); (0.0, now) while no client has ever come back.
        """
        groups, patience_s = self._groups, self._PATIENCE * self.mean_idle_s
        if not groups or not patience_s:
            return 0.0, now
        if groups[0][0] + patience_s <= now:
            self._give_up(now - patience_s)
            if not groups:
                return 0.0, now
        return self._awaited * self._share, groups[0][0] + patience_s

    def _take_out(self, answered_at: float, count: float) -> None:
        """Removes returned clients from the group of that time, what it lacks from its neighbours."""
        groups = self._groups
        place = len(groups) - 1
        while place >= 0 and groups[place][0] > answered_at + _NO_TIME_S:
            place -= 1
        if place < 0:
            return  # they were given up, and are in no group
        while groups and count > 0.0:
            place = min(place, len(groups) - 1)
            taken = min(count, groups[place][1])
            groups[place][1] -= taken
            self._awaited -= taken
            count -= taken
            if groups[place][1] <= 0.0:
                del groups[place]

    def _give_up(self, answered_until: float) -> None:
        groups = self._groups
        while groups and groups[0][0] <= answered_until:
            lost = groups.popleft()[1]
            self._awaited -= lost
            self._share *= (1.0 - self._SHARE_WEIGHT) ** lost
        if not groups:
            self._awaited = 0.0  # sheds what rounding has left

    def __repr__(self) -> str:
        return (
            f"<ReturningClients awaited {self._awaited:g} share {self._share:.2f} idle {self.mean_idle_s * 1e3:.3g} ms>"
        )


class BatchCost:
    """S(n) = a + b*n, learnt from the last few dozen batches by exponentially weighted least squares.

    The slope is pulled towards its last value with a force that counts as a spread of n of about a quarter of
    its mean. So when n hardly varies, which is what a good batching rule brings about, noise does not turn into
    slope and nothing learnt is forgotten; the fixed part follows the level of the service time, slope held.

    Until n has varied for the first time the slope is 0: all cost counts as fixed. That is on purpose the hopeful
    guess. It makes the rule try one larger batch as soon as a client is expected back within a service time, and
    one batch of another size is enough to know better. The opposite guess would never wait, so never learn.
    """

    #: What one batch counts in the means.
    _WEIGHT = 0.05
    #: The pull towards the last slope, as a part of the squared mean of n.
    _PULL = 0.05
    #: A batch that a pause of the machine fell into counts as this many mean service times at most.
    _LONGEST = 8.0

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self.per_request_s = 0.0
        self._batches = 0
        self._mean_n = 0.0
        self._mean_s = 0.0
        self._variance = 0.0
        self._covariance = 0.0

    def observe(self, n: int, service_s: float) -> None:
        """Takes note of a finished batch.

        It had `n` requests, and has kept a model worker busy for `service_s` seconds.
        """
        self._batches += 1
        # A plain mean while there are few batches, so that the first one does not linger.
        weight = max(self._WEIGHT, 1.0 / self._batches)
        if self._batches > 1:
            service_s = min(service_s, self._LONGEST * self._mean_s)
        step_n = n - self._mean_n
        step_s = service_s - self._mean_s
        self._mean_n += weight * step_n
        self._mean_s += weight * step_s
        kept = 1.0 - weight
        self._variance = kept * (self._variance + weight * step_n * step_n)
        self._covariance = kept * (self._covariance + weight * step_n * step_s)
        pull = self._PULL * self._mean_n * self._mean_n
        slope = (self._covariance + pull * self.per_request_s) / (self._variance + pull)
        # Neither part of a cost is negative, however noisy the batches.
        self.per_request_s = min(max(slope, 0.0), self._mean_s / self._mean_n)
        self.fixed_s = self._mean_s - self.per_request_s * self._mean_n

    def __repr__(self) -> str:
        return f"<BatchCost {self.fixed_s * 1e3:.3g} ms + {self.per_request_s * 1e3:.3g} ms * n>"
