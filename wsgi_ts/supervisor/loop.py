"""The supervisor's main loop: one thread that waits for descriptors, and does what other threads ask of it."""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from typing import Any

from wsgi_ts.errors import ServiceUnavailable

log = logging.getLogger(__name__)

#: How long another thread waits for the main thread to do something, in seconds.
_CALL_LIMIT_S = 10.0
#: So many failed turns within so many seconds, and the loop is given up.
_MAX_FAILURES = 5
_FAILURES_WINDOW_S = 60.0
#: Signals that must not end a supervisor; handlers and not SIG_IGN, which the children would inherit.
_IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGALRM, signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU)


class MainLoop:
    """One selector loop. `post` and `call` are for other threads (`post` for signal handlers too), the rest is not.

    Attributes:
        selector: what is waited for; the data of each key is called, without arguments, when its descriptor is ready.
    """

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._failed_at: deque[float] = deque(maxlen=_MAX_FAILURES)
        self._wakes_on_signals = False
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self.selector.register(self._wake_r, selectors.EVENT_READ, self._on_wake)

    def handle_signals(self, actions: Mapping[int, Callable[[], None]]) -> None:
        """Has each of `actions` called at once when its signal comes, which ends the present wait, too.

        Other signals that would end the process do nothing.
        """
        self._wakes_on_signals = True
        signal.set_wakeup_fd(self._wake_w.fileno(), warn_on_full_buffer=False)
        for number in (*_IGNORED_SIGNALS, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)):
            signal.signal(number, lambda *_: None)
        for number, action in actions.items():
            signal.signal(number, lambda *_, act=action: act())

    def close(self) -> None:
        """Gives its descriptors back; what is posted from now on is never done."""
        if self._wakes_on_signals:
            signal.set_wakeup_fd(-1)
        self.selector.close()
        self._wake_r.close()
        self._wake_w.close()

    def turn(self, wait_s: float, then: Callable[[float], None]) -> bool:
        """Waits for something to happen, `wait_s` seconds at most, and does what it asks for; what fails is logged.

        At the end of the turn `then` is called with the monotonic time. Returns False when turns fail again and again,
        so that it is better to stop.
        """
        try:
            for key, _ in self.selector.select(0.0 if self._posted else wait_s):
                # One event may have closed what the next one is about.
                if self.selector.get_map().get(key.fd) is key:
                    key.data()
            while self._posted:
                self._posted.popleft()()
            then(time.monotonic())
        except Exception:
            log.exception("The supervisor's loop failed")
            now = time.monotonic()
            self._failed_at.append(now)
            return not (len(self._failed_at) == _MAX_FAILURES and now - self._failed_at[0] < _FAILURES_WINDOW_S)
        return True

    def post(self, action: Callable[[], None]) -> None:
        """Has the main thread do something."""
        self._posted.append(action)
        # A full buffer means that it is being woken already.
        with contextlib.suppress(OSError):
            self._wake_w.send(b"\0")

    def call(self, action: Callable[[], Any]) -> Any:
        """Has the main thread do something; returns the result, or raises ServiceUnavailable where it is too busy."""
        future: Future[Any] = Future()

        def carry_out() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        self.post(carry_out)
        try:
            return future.result(_CALL_LIMIT_S)
        except NotInTime as error:
            raise ServiceUnavailable("The server is busy. Please try again in a few seconds.") from error

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_r.recv(4096):
                pass
