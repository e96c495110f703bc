"""The small model for bodies that are raw float32."""

from mlp import Mlp


class MlpHandler:
    """Bytes in, bytes out."""

    def initialize(self, context):
        """Makes the model."""
        self.model = Mlp()
        self.initialized = True

    def handle(self, data, context):
        """One pass for the batch."""
        return self.model.raw([row.get("body") or row.get("data") for row in data])
