"""mosec: an HTTP server in Rust before Python workers, each with a Unix socket.

It waits `max_wait_time` for a batch that is not full, so it does best without batches where few connections wait.
"""

from __future__ import annotations

from collections.abc import Mapping

from servers import BENCHMARKS, LARGEST_BODY_BYTES, CommandServer, Rival, environment

NAME = "mosec"


class MosecServer(CommandServer):
    """The server with one worker for each model."""

    def __init__(self, *, batch_size: int, wait_ms: int) -> None:
        super().__init__(NAME, folder=NAME, models=("echo", "mlp", "json"))
        self._batch = {"BATCH_SIZE": str(batch_size), "WAIT_MS": str(wait_ms)}

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """Its app is its command."""
        commands = environment(NAME, BENCHMARKS / "rivals" / "mosec.txt")
        words = [str(commands / "python"), str(BENCHMARKS / "apps" / "mosec_app.py")]
        words += ["--address", "127.0.0.1", "--port", str(self.port), "--timeout", "60000"]
        words += ["--max-request-size", str(LARGEST_BODY_BYTES)]
        return words, self._batch

    def path(self, model: str) -> str:
        """A route for each model."""
        return f"/{model}"


RIVAL = Rival(
    NAME,
    {
        "batch 1": lambda: MosecServer(batch_size=1, wait_ms=0),
        "batch 8, 1 ms": lambda: MosecServer(batch_size=8, wait_ms=1),
        "batch 32, 1 ms": lambda: MosecServer(batch_size=32, wait_ms=1),
    },
)
