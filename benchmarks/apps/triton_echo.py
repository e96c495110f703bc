"""The echo model for Triton's Python backend."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Answers with the tensors, as they came."""

    def execute(self, requests):
        """One answer for each request; the bytes are not looked at."""
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUTPUT", pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy())]
            )
            for request in requests
        ]
