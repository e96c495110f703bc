"""Where things lie in the run directory of an instance. Stdlib only: every process asks here."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def default_run_dir(temp_dir: Path | None = None) -> Path:
    """The run directory where none is given: one instance of a user for one directory of temporary files."""
    return (temp_dir or Path(tempfile.gettempdir())) / f"wsgi-ts-{os.getuid()}"


class RunFiles:
    """The paths in one run directory.

    Attributes:
        path: the directory, mode 0700.
        lock: held for the instance's life by guard and supervisor.
        record: what the instance has written down of itself.
        control_socket: the supervisor's socket.
        log_plan: how every process logs.
        routes: what the data path reads.
        tokens: what tokens are checked by.
        models: where archives are unpacked.
        plugins: what each process says of its plugins.
        traces_socket: where the supervisor takes records of slow and failed requests.
        spans_socket: where the exporter takes records of sampled ones.
        tune: what `wsgi-ts tune` has found last, a file for each model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lock = self.path / "lock"
        self.record = self.path / "record.json"
        self.control_socket = self.path / "control.sock"
        self.config = self.path / "config.json"
        self.log_plan = self.path / "logging.json"
        self.routes = self.path / "routes.json"
        self.tokens = self.path / "tokens.json"
        self.models = self.path / "models"
        self.plugins = self.path / "plugins"
        self.traces_socket = self.path / "traces.sock"
        self.spans_socket = self.path / "spans.sock"
        self.tune = self.path / "tune"
