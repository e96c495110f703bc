"""How a supervisor's life ends: who has asked for it, how fast it goes, and whether another follows."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence

from wsgi_ts.errors import BadRequest
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.child import SupervisedProcess
from wsgi_ts.supervisor.child_process import Child

log = logging.getLogger(__name__)

#: How long processes have to end from a second stop request on, and those that were killed, in seconds.
FAST_STOP_S = 2.0


class Ending:
    """The end of one supervisor.

    Attributes:
        requests: how often it was asked to stop; from the second time on nothing is waited for.
        exit_code: of the process.
        failure: why the instance could not be started; empty where it could.
        is_replaced: the guard starts another program, or the same with another configuration.
        came_up: it has taken requests.
    """

    def __init__(self, config: Config, guard: GuardLink) -> None:
        self.requests = 0
        self.exit_code = 0
        self.failure = ""
        self.is_replaced = False
        self.came_up = False
        self._config = config
        self._guard = guard

    @property
    def is_followed(self) -> bool:
        """Whether the guard starts another supervisor when this one ends now."""
        if self.is_replaced or (self._guard.is_trial and not self.came_up and self.failure):
            return True
        asked_for = bool(self.requests) and not self.exit_code
        return self._guard.pid is not None and not asked_for and (self.came_up or self._guard.life > 1)

    def request(self, count: int) -> None:
        """Asks for the end; 2 at a time for a fast one."""
        if self.is_replaced:
            # Nobody follows any more.
            self.is_replaced, self.requests = False, 0
            self._guard.say_stopping()
        self.requests += count

    def fail(self, reason: str) -> None:
        """Ends the instance at its start, since one of its processes has never worked and never will."""
        if self._guard.life > 1 and not self._guard.is_trial:
            # The configuration is the one with which the supervisor before has served.
            log.error("%s", reason)
            return
        self.failure = self.failure or reason
        if not self._guard.is_trial:
            self._guard.say_stopping()
        self.request(1)

    def replace(self, command: list[str], config: str, fixed: dict[str, str]) -> None:
        """Ends this supervisor, so that the guard starts another program, or the same with another configuration.

        `command` is the next supervisor's, without what the guard adds; `fixed` is `Config.fixed` of its configuration,
        whose JSON is not read here: a later version may have other keys.

        Raises:
            BadRequest: it cannot take this one's place.
        """
        for key in sorted(fixed.keys() | self._config.fixed.keys()):
            is_now, would_be = self._config.fixed.get(key, "none"), fixed.get(key, "none")
            if is_now != would_be:
                raise BadRequest(
                    f"An upgrade cannot change {key} ({is_now} now, {would_be} then); stop the server first."
                )
        if self._guard.pid is None or not self._guard.replace(command, config):
            raise BadRequest("There is no guard that could start the next server.")
        self.is_replaced = True
        self.requests += 1

    def wait_for(
        self,
        running: Sequence[SupervisedProcess],
        limit_s: float,
        turn: Callable[[], None],
        hasten: Callable[[Child], None] = lambda child: None,
    ) -> None:
        """Waits for processes to end, and kills those that have not when the time is over.

        Args:
            running: who was told to stop.
            limit_s: how long that may take, in seconds; less from a second stop request on.
            turn: a turn of the loop, in which their end is noticed.
            hasten: told to each of them on a second stop request.
        """
        deadline = time.monotonic() + limit_s
        hastened = False
        while left := [each.child for each in running if each.child is not None]:
            now = time.monotonic()
            if self.requests > 1 and not hastened:
                hastened = True
                deadline = min(deadline, now + FAST_STOP_S)
                for child in left:
                    hasten(child)
            if now >= deadline:
                for child in left:
                    log.warning("%s (pid %d) did not stop in time and is killed", child.role, child.pid)
                    child.send_signal(signal.SIGKILL)
                deadline = now + FAST_STOP_S
            turn()
