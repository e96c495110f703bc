"""Those who look at the console: each is sent once a second what has changed of the server, all of them the same.

One thread asks the supervisor, while there is anybody to send it to; the loop does the sending. Nobody who looks holds
a thread, and one who is slow misses snapshots instead of having them wait here: the next one tells all that has changed
since the oldest that a viewer has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import ServiceUnavailable
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.rest.console import EVENTS_PATH, SnapshotEvent, snapshot_event
from wsgi_ts.web.connection import Connection, Phase
from wsgi_ts.web.gate import GatedAccess

if TYPE_CHECKING:
    from wsgi_ts.web.answers import Answers

log = logging.getLogger(__name__)

MAX_VIEWERS = 16
INTERVAL_S = 1.0
#: A viewer that has taken nothing for so long has gone.
SILENT_LIMIT_S = 30.0
#: After so long a viewer has to ask again: plugins that say who may ask are asked anew then.
LIFE_S = 600.0


@dataclass(slots=True)
class _Viewer:
    """Somebody who looks.

    Attributes:
        began: when (monotonic).
        taken_at: when all that was sent had been taken.
        revision: of the last snapshot that was sent; 0: of none that the others have, too.
    """

    began: float
    taken_at: float
    revision: int = 0


class Viewers:
    """The viewers of one web worker; its methods are for the loop's thread.

    Args:
        wake: wakes the loop; called on a thread.
    """

    def __init__(self, control: ControlPlane, answers: Answers, wake: Callable[[], None]) -> None:
        self._control = control
        self._answers = answers
        self._wake = wake
        self._viewers: dict[Connection, _Viewer] = {}
        self._events: deque[SnapshotEvent] = deque()
        #: The oldest revision that a viewer has: the next snapshot tells what has changed since.
        self._oldest = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def wants(self, connection: Connection, response: Answer) -> bool:
        """Whether the app's answer is the begin of events for a viewer."""
        head = connection.head
        return head is not None and head.path == EVENTS_PATH and head.method == "GET" and response.status == 200

    def add(self, connection: Connection, response: Answer) -> None:
        """Begins to send a client events, the first of which is what the app has answered."""
        self._forget_closed()
        if len(self._viewers) >= MAX_VIEWERS:
            busy = ServiceUnavailable(f"{MAX_VIEWERS} viewers look at the console already; close one of them.")
            self._answers.error(connection, busy)
            return
        self._answers.begin_feed(connection, response)
        now = time.monotonic()
        self._oldest = 0
        with self._lock:
            self._viewers[connection] = _Viewer(now, now)
            if self._thread is None:
                self._thread = threading.Thread(target=self._ask, name="console", daemon=True)
                self._thread.start()

    def send(self) -> None:
        """Sends the newest snapshot, if there is one, to all who have taken the last one and can understand it."""
        if not self._events:
            return
        event = self._events[-1]
        self._events.clear()
        self._forget_closed()
        now = time.monotonic()
        for connection, viewer in list(self._viewers.items()):
            if connection.unsent:
                if now - viewer.taken_at > SILENT_LIMIT_S:
                    self._answers.drop(connection)
                continue
            viewer.taken_at = now
            if now - viewer.began > LIFE_S or not _may_look_on(connection):
                self._end(connection)
            elif viewer.revision >= event.since:
                self._answers.feed(connection, event.data)
                viewer.revision = event.revision or viewer.revision
        self._oldest = min((viewer.revision for viewer in self._viewers.values()), default=0)

    def end_all(self) -> None:
        """Ends all streams: the server stops."""
        self._forget_closed()
        for connection in list(self._viewers):
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        del self._viewers[connection]
        self._answers.end_feed(connection)

    def _forget_closed(self) -> None:
        for connection in [each for each in self._viewers if each.closed or each.phase != Phase.STREAM]:
            del self._viewers[connection]

    def _ask(self) -> None:
        """Asks for a snapshot a second until nobody looks; on the thread."""
        pause = threading.Event()
        while not pause.wait(INTERVAL_S):
            with self._lock:
                if not self._viewers:
                    self._thread = None
                    return
            try:
                self._events.append(snapshot_event(self._control, self._oldest))
            except Exception:
                log.exception("The console misses a second")
            self._wake()


def _may_look_on(connection: Connection) -> bool:
    """Whether the key that a viewer has come with still counts."""
    access, head = connection.endpoint.access, connection.head
    if access is None or head is None:
        return True
    if not isinstance(access, GatedAccess) and access.has_admitted(head):
        return True
    return access.refusal_of(head) is None
