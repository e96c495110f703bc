"""A layer pair split over ranks: the model of the hand-over and recovery measurements, with and without a server."""

from __future__ import annotations

import torch
import torch.distributed as dist

WIDTH, HIDDEN = 512, 2048
#: Rows of one request: its body is ROWS x WIDTH floats.
ROWS = 8
BODY_BYTES = 4 * ROWS * WIDTH


class TensorParallelMLP:
    """Two layers, the first split by columns and the second by rows: one all_reduce for each batch.

    The process group exists already; without one it is the whole model, which one process runs by itself. Weights are
    random, the same for each number of ranks. Each process computes on one thread.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._is_split = dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self._is_split else (0, 1)
        generator = torch.Generator().manual_seed(0)
        up = torch.randn(WIDTH, HIDDEN, generator=generator) / WIDTH**0.5
        down = torch.randn(HIDDEN, WIDTH, generator=generator) / HIDDEN**0.5
        self._up = up.chunk(ranks, dim=1)[rank].contiguous()
        self._down = down.chunk(ranks, dim=0)[rank].contiguous()

    def answer(self, body: bytes | bytearray) -> bytes:
        """The output, as bytes, for rows of floats.

        Args:
            body: BODY_BYTES bytes; the same ones on each rank.
        """
        with torch.inference_mode():
            rows = torch.frombuffer(body, dtype=torch.float32).view(-1, WIDTH)
            output = torch.relu(rows @ self._up) @ self._down
            if self._is_split:
                dist.all_reduce(output)
            return bytes(output.numpy())
