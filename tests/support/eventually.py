"""Waiting for something to become true: poll with a limit, never a bare sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.02
#: How many times as long a machine may take that runs other tests as well.
PATIENCE = 3
#: The limit is never shorter than this, in seconds: a process that is waited for may not run for a while.
LEAST_S = 60.0


def eventually(predicate: Callable[[], T], *, within: float, what: str = "") -> T:
    """Calls `predicate` until it returns something true, and returns that.

    Args:
        predicate: what to wait for; an AssertionError it raises counts as "not yet".
        within: the limit in seconds, for a machine that does nothing else.
        what: names the condition in the failure.

    Raises:
        AssertionError: the limit passed; its cause is the predicate's last own AssertionError.
    """
    limit_s = max(LEAST_S, within * PATIENCE)
    deadline = time.monotonic() + limit_s
    while True:
        failure: AssertionError | None = None
        try:
            value = predicate()
            if value:
                return value
        except AssertionError as error:
            failure = error
        if time.monotonic() >= deadline:
            name = what or getattr(predicate, "__name__", "the condition")
            raise AssertionError(f"{name}: not within {limit_s:g} s") from failure
        time.sleep(POLL_S)
