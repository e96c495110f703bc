"""TorchServe 0.12: batches of 32 for small bodies; with large ones it does best without batches."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from archive_server import ArchiveServer
from servers import BENCHMARKS, BenchmarkError, Rival, environment

NAME = "torchserve"


def server(*, batch_size: int, models: Sequence[str], **options: Any) -> ArchiveServer:
    """The server, not yet started, with further options of `ArchiveServer`; installs it the first time."""
    commands = environment(NAME, BENCHMARKS / "rivals" / "torchserve.txt")
    command = (str(commands / "torchserve"),)
    return ArchiveServer(NAME, command, batch_size=batch_size, max_batch_delay_ms=5, models=models, **options)


def check_java() -> None:
    """Looks for Java.

    Raises:
        BenchmarkError: it is missing or too old.
    """
    if shutil.which("java") is None:
        raise BenchmarkError(
            "TorchServe needs Java 11 or newer (Debian, Ubuntu: apt-get install default-jre-headless); "
            "`--only wsgi-ts` goes without."
        )
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version.group(1)) < 11:
        raise BenchmarkError(f"TorchServe needs Java 11 or newer; this is:\n{said}")


_MODELS = ("echo", "mlp", "json")
RIVAL = Rival(
    NAME,
    {
        "batch 1": lambda: server(batch_size=1, models=_MODELS),
        "batch 32, 5 ms": lambda: server(batch_size=32, models=_MODELS),
    },
)
