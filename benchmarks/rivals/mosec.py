"""mosec: an HTTP server in Rust before Python workers, each with a Unix socket.

It waits `max_wait_time` for a batch that is not full, so it does best without batches where few connections wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from servers import BENCHMARKS, LARGEST_BODY_BYTES, CommandServer, Rival, environment

NAME = "mosec"


class MosecServer(CommandServer):
    """The server with one worker for each model.

    Args:
        app: its program.
        models: those that this serves.
        variables: of the program's environment.
    """

    def __init__(
        self,
        *,
        app: Path = BENCHMARKS / "apps" / "mosec_app.py",
        models: Sequence[str] = ("echo", "mlp", "json"),
        variables: Mapping[str, str],
    ) -> None:
        super().__init__(NAME, folder=NAME, models=models)
        self._app = app
        self._variables = variables

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """Its app is its command."""
        commands = environment(NAME, BENCHMARKS / "rivals" / "mosec.txt")
        words = [str(commands / "python"), str(self._app)]
        words += ["--address", "127.0.0.1", "--port", str(self.port), "--timeout", "60000"]
        words += ["--max-request-size", str(LARGEST_BODY_BYTES)]
        return words, self._variables

    def path(self, model: str) -> str:
        """A route for each model."""
        return f"/{model}"


def server(batch_size: int, wait_ms: int) -> MosecServer:
    """Returns the server with so large batches, which wait so long for more."""
    return MosecServer(variables={"BATCH_SIZE": str(batch_size), "WAIT_MS": str(wait_ms)})


RIVAL = Rival(
    NAME,
    {
        "batch 1": lambda: server(1, 0),
        "batch 8, 1 ms": lambda: server(8, 1),
        "batch 32, 1 ms": lambda: server(32, 1),
    },
)
