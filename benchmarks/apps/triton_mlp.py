"""The small model for Triton's Python backend."""

import numpy
import torch  # noqa: TID253 (the model needs it)
import triton_python_backend_utils as pb_utils
from mlp import INPUTS, Mlp


class TritonPythonModel:
    """Tensors of float32 in and out, raw or as JSON."""

    def initialize(self, arguments):
        """Makes the model."""
        self.model = Mlp()

    def execute(self, requests):
        """One pass for all requests, each of which has one row."""
        inputs = [pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy() for request in requests]
        rows = torch.from_numpy(numpy.concatenate(inputs).reshape(-1, INPUTS))
        outputs = self.model.rows(rows).numpy().reshape(len(requests), *inputs[0].shape[:-1], -1)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", output)]) for output in outputs]
