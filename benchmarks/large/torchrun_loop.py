"""The split model in a loop, without a server: `torchrun --nproc-per-node=2 torchrun_loop.py COUNT PAUSE_MS`.

Before each batch every rank sleeps for PAUSE_MS, which is not counted; with 0 they go on at once. Rank 0 prints a line
with the nanoseconds of each batch, as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch.distributed as dist
from tensor_parallel import BODY_BYTES, TensorParallelMLP

WARM_UP = 50


def main() -> None:
    """Runs COUNT batches after some that are not counted."""
    count, pause_s = int(sys.argv[1]), float(sys.argv[2]) / 1e3
    dist.init_process_group("gloo")
    model = TensorParallelMLP()
    durations = []
    for _ in range(WARM_UP + count):
        body = bytearray(BODY_BYTES)  # a new one for each batch, as a server has
        if pause_s:
            time.sleep(pause_s)
        began = time.perf_counter_ns()
        model.answer(body)
        durations.append(time.perf_counter_ns() - began)
    if dist.get_rank() == 0:
        print(json.dumps(durations[WARM_UP:]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
