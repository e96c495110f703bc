"""A model whose batches take a + b*n milliseconds, as its model-config.yaml says, without using the CPU."""

import ctypes
import time

PR_SET_TIMERSLACK = 29


class CostHandler:
    """Sleeps, as a host does while its accelerator works."""

    def initialize(self, context):
        """Reads a and b, and asks the kernel to end sleeps on time instead of 50 µs later."""
        cost = context.model_yaml_config["cost"]
        self.fixed_s, self.per_request_s = cost["fixed_ms"] / 1e3, cost["per_request_ms"] / 1e3
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)

    def handle(self, data, context):
        """A short answer for each request."""
        time.sleep(self.fixed_s + self.per_request_s * len(data))
        return [b"ok"] * len(data)
