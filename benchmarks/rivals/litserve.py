"""LitServe: FastAPI and uvicorn before worker processes, with queues of a multiprocessing manager between them.

`fast_queue` is left out: in this version it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from servers import BENCHMARKS, CommandServer, Rival, environment

NAME = "litserve"


class LitServeServer(CommandServer):
    """The server with one worker for each model.

    Args:
        app: its program, which is told its PORT.
        models: those that this serves.
        variables: further ones of the program's environment.
    """

    def __init__(
        self,
        *,
        app: Path = BENCHMARKS / "apps" / "litserve_app.py",
        models: Sequence[str] = ("echo", "mlp", "json"),
        variables: Mapping[str, str],
    ) -> None:
        super().__init__(NAME, folder=NAME, models=models)
        self._app = app
        self._variables = {**variables, "PORT": str(self.port)}

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """Its app is its command."""
        commands = environment(NAME, BENCHMARKS / "rivals" / "litserve.txt")
        return [str(commands / "python"), str(self._app)], self._variables

    def path(self, model: str) -> str:
        """A route for each model."""
        return f"/{model}"


def server(batch_size: int, *, batch_timeout_s: float = 0, api_servers: int = 1) -> LitServeServer:
    """Returns the server with so large batches, which wait so long for more, and so many HTTP processes."""
    variables = {"BATCH_SIZE": batch_size, "BATCH_TIMEOUT_S": batch_timeout_s, "API_SERVERS": api_servers}
    return LitServeServer(variables={name: str(value) for name, value in variables.items()})


RIVAL = Rival(
    NAME,
    {
        "batch 1": lambda: server(1),
        "batch 1, 2 API servers": lambda: server(1, api_servers=2),
        "batch 32, 1 ms": lambda: server(32, batch_timeout_s=0.001),
    },
)
