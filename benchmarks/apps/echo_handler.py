"""Answers every request with its own body: what is left is the cost of serving."""


class EchoHandler:
    """The least that a handler can do."""

    def initialize(self, context):
        """Nothing to load."""
        self.initialized = True

    def handle(self, data, context):
        """The bodies, as they came."""
        return [row.get("body") or row.get("data") for row in data]
