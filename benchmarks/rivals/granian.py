"""Granian's WSGI mode with a Falcon app that answers with the body: what HTTP alone costs, with no model behind it."""

from __future__ import annotations

from collections.abc import Mapping

from servers import BENCHMARKS, CommandServer, Rival, environment

NAME = "granian"


class GranianServer(CommandServer):
    """The server with the echo only."""

    def __init__(self, *, workers: int) -> None:
        super().__init__(NAME, folder=NAME, models=("echo",))
        self._workers = workers

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """HTTP/1 only; one thread for the app in each worker, which Granian's advice is for apps that never wait."""
        commands = environment(NAME, BENCHMARKS / "rivals" / "granian.txt")
        words = [str(commands / "granian"), "--interface", "wsgi", "--port", str(self.port), "--http", "1", "--no-ws"]
        words += ["--workers", str(self._workers), "--blocking-threads", "1"]
        words += ["--working-dir", str(BENCHMARKS / "apps"), "falcon_app:app"]
        return words, {}

    def path(self, model: str) -> str:
        """A route for each model."""
        return f"/{model}"


RIVAL = Rival(NAME, {"1 worker": lambda: GranianServer(workers=1), "2 workers": lambda: GranianServer(workers=2)})
