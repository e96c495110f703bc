"""Makes the TorchScript model of the handler template: the mean of the numbers of each request.

Run: `python examples/handler_template/make_model.py OUTPUT_FOLDER`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Dict, List  # noqa: UP035  TorchScript knows these names only

import torch


class MeanOfEachRequest(torch.nn.Module):
    """Takes a batch as the server hands it over, one dict per request, so that the handler needs no preprocessing."""

    def forward(self, data: List[Dict[str, List[float]]]) -> List[float]:  # noqa: UP006
        """One mean per request; the body of each is a JSON list of numbers."""
        means: List[float] = []  # noqa: UP006
        for row in data:
            means.append(float(torch.tensor(row["body"]).mean()))
        return means


def main() -> None:
    """Writes model.pt into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/handler_template/make_model.py OUTPUT_FOLDER")
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    torch.jit.script(MeanOfEachRequest()).save(output / "model.pt")


if __name__ == "__main__":
    main()
