"""What the measurements of large models share: how much to do, one client, quantiles."""

from __future__ import annotations

import http.client
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from servers import BenchmarkError, Server

FOLDER = Path(__file__).resolve().parent
#: The figures of one round; the report takes the median of each over the rounds.
Figures = dict[str, float]


@dataclass(frozen=True)
class Effort:
    """How much each round does.

    Attributes:
        batches: batches of each kind for the hand-over.
        payloads: payloads for each way of bringing them to the ranks.
        seconds: length of each run of token generation.
    """

    batches: int
    payloads: int
    seconds: float


class Client:
    """One keep-alive connection that waits for each answer.

    Args:
        server: the server to ask.
    """

    def __init__(self, server: Server) -> None:
        address = urlsplit(server.inference)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)

    def ask(self, model: str, body: bytes) -> tuple[int, bytes]:
        """One prediction.

        Returns:
            The monotonic time at which the last byte of the request was handed to the kernel, in ns, and the answer.

        Raises:
            BenchmarkError: there is no answer, or it is not a 200.
        """
        headers = {"Content-Type": "application/octet-stream"}
        try:
            self._connection.request("POST", f"/predictions/{model}", body, headers)
            sent = time.monotonic_ns()
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise BenchmarkError(f"{model} gave no answer: {error!r}") from error
        if answer.status != 200:
            raise BenchmarkError(f"{model} answered with {answer.status}: {content[:300]!r}")
        return sent, content

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of the values do not exceed.

    Raises:
        BenchmarkError: there are none.
    """
    if not values:
        raise BenchmarkError("a run gave no values: give it more time (--seconds)")
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
