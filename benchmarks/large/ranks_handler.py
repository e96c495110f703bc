"""The handler of the hand-over and recovery measurements: a model, split over the ranks of its group, or none."""

import torch.distributed as dist
from tensor_parallel import TensorParallelMLP


class RanksHandler:
    """With `handler: {model: true}` in model-config.yaml it runs the model, else it answers with the body."""

    def initialize(self, context):
        """Joins the other ranks where the model spans several processes."""
        self.model = None
        if hasattr(context, "group"):
            dist.init_process_group("gloo")
        if context.model_yaml_config["handler"]["model"]:
            self.model = TensorParallelMLP()

    def handle(self, data, context):
        """One answer for each body."""
        bodies = [row["body"] for row in data]
        return bodies if self.model is None else [self.model.answer(body) for body in bodies]
