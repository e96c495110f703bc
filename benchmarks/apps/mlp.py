"""The small real model that every server runs: 256 -> 512 -> 10, the same weights everywhere, one thread."""

from __future__ import annotations

import torch  # noqa: TID253 (a model needs it)

INPUTS = 256


class Mlp:
    """Two linear layers with a ReLU between them."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        layers = (torch.nn.Linear(INPUTS, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
        self.module = torch.nn.Sequential(*layers).eval()

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """10 numbers for each row of 256."""
        with torch.inference_mode():
            result: torch.Tensor = self.module(rows)
            return result

    def raw(self, bodies: list[bytes]) -> list[bytes]:
        """10 float32 for each body of 256 float32, in the machine's byte order; one pass for all bodies."""
        rows = torch.frombuffer(bytearray(b"".join(bodies)), dtype=torch.float32).view(-1, INPUTS)
        return [row.tobytes() for row in self.rows(rows).numpy()]

    def lists(self, rows: list[list[float]]) -> list[list[float]]:
        """10 numbers for each list of 256; one pass for all lists."""
        return self.rows(torch.as_tensor(rows, dtype=torch.float32)).tolist()
