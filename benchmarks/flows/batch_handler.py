"""Echoes after 5 ms for the whole batch, and tells whoever sends `count` of the requests and batches until then."""

import time
from typing import Any

SECONDS = 0.005
QUESTION = b"count"


class BatchHandler:
    """A model for which a batch costs what one request does."""

    def initialize(self, context: Any) -> None:
        """Nothing has been counted yet."""
        self.requests = self.batches = 0
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """The bodies; for the question, `requests batches` without its own batch."""
        bodies = [row.get("body") or row.get("data") for row in data]
        counted = f"{self.requests} {self.batches}"
        if QUESTION not in bodies:
            self.requests += len(data)
            self.batches += 1
            time.sleep(SECONDS)
        return [counted if body == QUESTION else body for body in bodies]
