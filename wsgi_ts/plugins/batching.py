"""A batching policy of a plugin, called with care: one that raises or is slow is switched off; the built-in goes on.

A call may take 50 µs. What it takes longer is added up, and what it stays below is taken off again: a machine that
pauses now and then costs a policy nothing, one that is slow all the time is off after a few thousand calls, and one
that sleeps at once. One that never comes back takes its batcher along: that a call is under way stands in shared
memory, where the next batcher finds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, MutableSequence
from typing import Any, TypeVar

from wsgi_ts.plugins.api import BatchHead, ModelState, QueueState
from wsgi_ts.plugins.discovery import POLICY_METHODS
from wsgi_ts.plugins.found import Found, PluginError, found_in, import_object, made
from wsgi_ts.plugins.report import LOADED, OFF, PluginReport
from wsgi_ts.plugins.threads import LOAD_LIMIT_S, within
from wsgi_ts.settings.config import Config

#: What one call may take, and how far all of them together may be above that, in seconds.
BUDGET_S = 50e-6
MOST_ABOVE_S = 0.1
INSTEAD = "the model's batches are formed by the built-in rule from now on"

Result = TypeVar("Result")


class BatchingRules:
    """What the batcher asks of a policy; a method that the policy lacks has the answer of the built-in rule.

    Args:
        calls: `calls[at]` is 1 while a call is under way, else 0.

    Attributes:
        is_on: the policy is asked.
        has_wait: it says how long to wait, too.
    """

    def __init__(
        self, found: Found, policy: Any, report: PluginReport, calls: MutableSequence[int] | memoryview, at: int = 0
    ) -> None:
        self.is_on = True
        self._calls = calls
        self._at = at
        self.has_wait = hasattr(policy, "wait")
        self._found = found
        self._report = report
        self._above_s = 0.0
        self._key = getattr(policy, "key", None)
        self._cost = getattr(policy, "cost", None)
        self._admit = getattr(policy, "admit", None)
        self._wait = getattr(policy, "wait", None)

    def key(self, head: BatchHead) -> Hashable:
        """Requests with unlike keys never share a batch."""
        return self._ask(self._key, _checked_key, None, head)

    def cost(self, head: BatchHead) -> float:
        """What a request adds to its batch."""
        return self._ask(self._cost, float, 1.0, head)

    def admit(self, batch_cost: float, batch_n: int, cost: float) -> bool:
        """Whether a request of this cost may join a batch."""
        return self._ask(self._admit, bool, True, batch_cost, batch_n, cost)

    def wait(self, queue: QueueState, model: ModelState) -> float:
        """Seconds to wait for more requests."""
        return self._ask(self._wait, float, 0.0, queue, model)

    def _ask(
        self, method: Callable[..., Any] | None, check: Callable[[Any], Result], otherwise: Result, *arguments: Any
    ) -> Result:
        if method is None or not self.is_on:
            return otherwise
        began = time.perf_counter()
        self._calls[self._at] = 1
        try:
            result = check(method(*arguments))
        except BaseException as error:  # no signal is handled on this thread: whatever it is, it is the policy's
            self._switch_off(error)
            return otherwise
        finally:
            self._calls[self._at] = 0
        above_s = self._above_s + time.perf_counter() - began - BUDGET_S
        self._above_s = max(0.0, above_s)
        if above_s > MOST_ABOVE_S:
            self._switch_off(f"its calls take longer than {BUDGET_S * 1e6:g} µs")
        return result

    def _switch_off(self, error: BaseException | str) -> None:
        self.is_on = False
        self._report.failed(self._found, error, state=OFF, instead=INSTEAD)


def wanted_policy(config: Config, wanted: str) -> Found:
    """The plugin that a model wants: by the name of one of the group `batching`, or as `module:attribute`."""
    named = {each.name: each for each in found_in(config.found_plugins, "batching")}
    return named.get(wanted) or Found(wanted, "batching", wanted, "model-config.yaml")


def load_rules(
    found: Found, report: PluginReport, calls: MutableSequence[int] | memoryview, at: int = 0
) -> BatchingRules | None:
    """The rules of a policy; None where they cannot be had, which is told. `calls` and `at`: see `BatchingRules`."""
    try:
        policy = within(LOAD_LIMIT_S, lambda: _policy(found))
        rules = BatchingRules(found, policy, report, calls, at)
    except Exception as error:
        report.failed(found, error, state=OFF, instead=INSTEAD)
        return None
    report.note(found, LOADED)
    return rules


def _policy(found: Found) -> Any:
    if ":" not in found.target:
        raise PluginError("there is no such plugin of the group batching, and it is not of the form module:attribute")
    plugin = import_object(found.target)
    # Before it is called: whatever stands there must be meant for this.
    if not any(hasattr(plugin, name) for name in POLICY_METHODS):
        raise PluginError(f"a plugin of the group batching needs one of {', '.join(POLICY_METHODS)}")
    return made(plugin)


def _checked_key(key: Hashable) -> Hashable:
    hash(key)
    return key
