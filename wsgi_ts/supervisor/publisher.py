"""What the supervisor makes known to the data path: the routes and what tokens are checked by.

Each is a file in the run directory that is replaced in one step, and a word on the board that tells of the new one.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.instance.run_directory import RunDirectory, write_json
from wsgi_ts.models.registry import Registry
from wsgi_ts.security.tokens import KeyFileError

log = logging.getLogger(__name__)


class Publisher:
    """Publishes what other processes of the instance have to know. Used from any thread."""

    def __init__(self, registry: Registry, board: Board, directory: RunDirectory) -> None:
        self._registry = registry
        self._board = board
        self._directory = directory
        self._epoch = 0
        # None: the last publication failed.
        self._published: dict[str, Any] | None = None

    def routes(self) -> None:
        """Makes the registry's present state known, if it is news; what a full disk prevents is done later.

        The file has all models, and every web worker reads it anew: most changes of a worker are no news.
        """
        with self._registry.changed:
            self._registry.note_start()
            routes = self._registry.routes(self._epoch + 1, time.monotonic())
            news = {**routes, "epoch": 0}
            if news == self._published:
                return
            try:
                write_json(self._directory.routes, routes)
            except OSError as error:
                self._published = None
                log.error(
                    "%s cannot be written: %s; requests go where they went before, until there is room",
                    self._directory.routes,
                    error.strerror,
                )
                return
            self._published = news
            self._epoch += 1
            self._board.bump_epoch()

    def follow(self, now: float) -> None:
        """Publishes what has changed by itself at the monotonic time `now`; to be called once a second."""
        self._registry.note_start()
        known, present = self._published, (self._registry.is_healthy(now), self._registry.started)
        if known is None or (known["healthy"], known["started"]) != present:
            self.routes()

    def tokens(self, keys: dict[str, Any]) -> None:
        """Makes known what tokens are checked by; once this returns, nobody accepts what it replaced.

        Raises:
            KeyFileError: it cannot be made known.
        """
        try:
            write_json(self._directory.tokens, keys)
        except OSError as error:
            raise KeyFileError(f"{self._directory.tokens} cannot be written: {error.strerror}") from error
        self._board.bump_token_epoch()
