"""The handler of all four models: a batch of tensors goes through a TorchScript module.

Between the nodes of a workflow a tensor travels as `torch.save` writes it.
"""

import io
import os

import torch


class TensorHandler:
    """Loads the archive's module, and runs it on batches."""

    def initialize(self, context):
        torch.set_num_threads(1)
        model_dir = context.system_properties["model_dir"]
        self.module = torch.jit.load(os.path.join(model_dir, context.manifest["model"]["serializedFile"]))

    def handle(self, data, context):
        batch = torch.stack([torch.load(io.BytesIO(row["body"]), weights_only=True) for row in data])
        with torch.inference_mode():
            return list(self.module(batch).clone())
