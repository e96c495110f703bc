"""Our gunicorn worker class: it gives gunicorn's sockets, signals and heartbeat to a `WebLoop`.

Submit early, answer late: the loop pushes a prediction to a batcher as soon as it is received, and calls the WSGI app
when the answer is there, with the finished ticket in the environ (`web_requests`, `web_answers`).
"""

from __future__ import annotations

import logging
import os

from gunicorn.workers.base import Worker

from wsgi_ts.dataplane.plane import DataPlane
from wsgi_ts.web.loop import WebLoop

log = logging.getLogger(__name__)


class WebWorker(Worker):  # type: ignore[misc]
    """gunicorn calls `load_wsgi` and then `run` in the worker process; its signal handlers clear `alive`."""

    def load_wsgi(self) -> None:
        """Gets the apps, and everything else that must be there before this worker counts as booted."""
        super().load_wsgi()
        instance = self.app.instance
        plane = None
        if self.app.kind == "inference":
            plane = DataPlane(instance.config, instance.run_dir, instance.prefix)
        kinds = [self.app.kinds_for(sock) for sock in self.sockets]
        self._loop = WebLoop(
            instance,
            [self.app.app_for(sock) for sock in self.sockets],
            self.sockets,
            plane,
            [self.app.context if instance.config.addresses[each[0]].is_tls else None for each in kinds],
            kinds,
            self.PIPE[0],
            self._on_tick,
        )

    def run(self) -> None:
        """Serves until told to stop."""
        self._loop.run(lambda: self.alive)

    def _on_tick(self) -> bool:
        self.notify()
        if self.ppid == os.getppid():
            return True
        log.info("The gunicorn arbiter has gone; this web worker leaves.")
        return False
