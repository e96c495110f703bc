"""Echoes after 50 ms, as a host waits while its accelerator works."""

import time

SECONDS = 0.05


class SlowHandler:
    """A model that takes its time."""

    def initialize(self, context):
        """Nothing to load."""
        self.initialized = True

    def handle(self, data, context):
        """The bodies, later."""
        time.sleep(SECONDS)
        return [row.get("body") or row.get("data") for row in data]
