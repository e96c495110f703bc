"""The model in a loop, without a server: `torchrun --nproc-per-node=2 torchrun_loop.py COUNT`.

With one process it is the whole model, without a process group. Rank 0 prints a line with the nanoseconds of each
batch, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch.distributed as dist
from tensor_parallel import BODY_BYTES, TensorParallelMLP

WARM_UP = 50


def main() -> None:
    """Runs COUNT batches after some that are not counted."""
    count = int(sys.argv[1])
    is_split = int(os.environ["WORLD_SIZE"]) > 1
    if is_split:
        dist.init_process_group("gloo")
    model = TensorParallelMLP()
    durations = []
    for _ in range(WARM_UP + count):
        body = bytearray(BODY_BYTES)  # a new one for each batch, as a server has
        began = time.perf_counter_ns()
        model.answer(body)
        durations.append(time.perf_counter_ns() - began)
    if os.environ["RANK"] == "0":
        print(json.dumps(durations[WARM_UP:]))
    if is_split:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
