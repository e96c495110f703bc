"""LitServe: FastAPI and uvicorn before worker processes, with queues of a multiprocessing manager between them.

`fast_queue` is left out: in this version it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from servers import BENCHMARKS, CommandServer, Rival, environment

NAME = "litserve"


class LitServeServer(CommandServer):
    """The server with one worker for each model."""

    def __init__(self, *, batch_size: int, batch_timeout_s: float = 0, api_servers: int = 1) -> None:
        super().__init__(NAME, folder=NAME, models=("echo", "mlp", "json"))
        self._settings = {
            "BATCH_SIZE": str(batch_size),
            "BATCH_TIMEOUT_S": str(batch_timeout_s),
            "API_SERVERS": str(api_servers),
            "PORT": str(self.port),
        }

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """Its app is its command."""
        commands = environment(NAME, BENCHMARKS / "rivals" / "litserve.txt")
        return [str(commands / "python"), str(BENCHMARKS / "apps" / "litserve_app.py")], self._settings

    def path(self, model: str) -> str:
        """A route for each model."""
        return f"/{model}"


RIVAL = Rival(
    NAME,
    {
        "batch 1": lambda: LitServeServer(batch_size=1),
        "batch 1, 2 API servers": lambda: LitServeServer(batch_size=1, api_servers=2),
        "batch 32, 1 ms": lambda: LitServeServer(batch_size=32, batch_timeout_s=0.001),
    },
)
