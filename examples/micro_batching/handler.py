"""The MNIST handler with micro-batching: while one piece of a batch is in inference, the next is being decoded.

Archived with --extra-files examples/mnist/mnist_handler.py, whose class it derives from.
"""

from __future__ import annotations

from typing import Any

from mnist_handler import MNISTDigitClassifier

from ts.handler_utils.micro_batching import MicroBatching


class MicroBatchedDigitClassifier(MNISTDigitClassifier):
    """Answers what the MNIST handler answers; size of the pieces and threads per phase come from model-config.yaml."""

    def __init__(self) -> None:
        super().__init__()
        # Replaces the method `handle` of this object.
        self.handle = MicroBatching(self)

    def initialize(self, context: Any) -> None:
        """Loads the model and reads the settings of micro-batching."""
        super().initialize(context)
        options = context.model_yaml_config["micro_batching"]
        self.handle.micro_batch_size = options["micro_batch_size"]
        self.handle.parallelism = options["parallelism"]
