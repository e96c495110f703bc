"""wsgi-ts and TorchServe: the same commands, configuration file and archives, so nothing here knows which one it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from servers import (
    BENCHMARKS,
    LARGEST_BODY_BYTES,
    PROJECT,
    START_LIMIT_S,
    STOP_LIMIT_S,
    WORK,
    BenchmarkError,
    Server,
    free_ports,
    http_request,
)

OURS = "wsgi-ts"
STORE = WORK / "model-store"
_STARTED = "Model server started."
_WORKFLOW_LIMIT_S = 600.0
#: The files of each model's archive, the handler first.
FILES = {
    "echo": ("echo_handler.py",),
    "torchmodel": ("torch_handler.py",),
    "mlp": ("mlp_handler.py", "mlp.py"),
    "json": ("json_handler.py", "mlp.py"),
}


class ArchiveServer(Server):
    """A server with TorchServe's interface.

    Args:
        name: as the tables have it.
        command: its `torchserve` command.
        batch_size: of the models that it starts with.
        max_batch_delay_ms: of the same.
        workers: of each of the same.
        settings: further lines of its configuration file.
        environment: further variables.
        models: those it starts with.
        folder: its working folder's name, where it is not the server's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        batch_size: int,
        max_batch_delay_ms: int,
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        models: Sequence[str],
        folder: str = "",
    ) -> None:
        super().__init__(name, folder=folder or name, models=models)
        self._torchserve = command
        self._environment = environment or {}
        ports = free_ports(4)
        self.management = f"http://127.0.0.1:{ports[0]}"
        self.metrics = f"http://127.0.0.1:{ports[1]}"
        self.grpc = f"127.0.0.1:{ports[2]}"
        self._settings = {
            "inference_address": self.inference,
            "management_address": self.management,
            "metrics_address": self.metrics,
            "grpc_inference_port": str(ports[2]),
            "grpc_management_port": str(ports[3]),
            "disable_token_authorization": "true",
            "job_queue_size": "1000",
            "max_request_size": str(LARGEST_BODY_BYTES),
            "max_response_size": str(LARGEST_BODY_BYTES),
            "models": json.dumps(
                {model: {"1.0": _model(model, batch_size, max_batch_delay_ms, workers)} for model in models}
            ),
            **(settings or {}),
        }

    def launch(self) -> None:
        """Runs `torchserve --start`, which ends when the server runs in the background."""
        config = self.folder / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in self._settings.items()))
        status = self._command(
            "--start", "--ncs", "--model-store", str(STORE), "--ts-config", str(config),
            "--models", *(f"{model}={model}.mar" for model in self.models),
        )  # fmt: skip
        if status:
            raise BenchmarkError(f"{self.name} did not start (exit status {status}):\n{self.last_lines()}")

    def pid(self) -> int:
        """What the pid file says."""
        return int((self.folder / "tmp" / ".model_server.pid").read_text())

    def ask_to_stop(self) -> None:
        """Runs `torchserve --stop`."""
        self._command("--stop", "--foreground")

    def path(self, model: str) -> str:
        """The predictions API."""
        return f"/predictions/{model}"

    def describe(self, model: str) -> dict[str, Any]:
        """The management API's description of a model."""
        answer: list[dict[str, Any]] = json.loads(http_request("GET", f"{self.management}/models/{model}"))
        return answer[0]

    @contextmanager
    def registered(self, *models: str) -> Iterator[None]:
        """Further models of the store, with the workers that their model-config.yaml says, for as long as it is open.

        Raises:
            BenchmarkError: one of them cannot be loaded.
        """
        try:
            for model in models:
                try:
                    http_request("POST", f"{self.management}/models?url={model}.mar&synchronous=true", b"")
                except urllib.error.HTTPError as error:
                    text = error.read().decode(errors="replace")
                    raise BenchmarkError(f"{self.name} cannot load {model}: {text}\n{self.last_lines()}") from error
            yield
        finally:
            for model in models:
                with suppress(OSError):  # not registered, or the server is gone, which has been told of
                    http_request("DELETE", f"{self.management}/models/{model}")

    def register_workflow(self, name: str) -> float:
        """Registers a workflow of the store; the seconds until the server says that its workers are ready.

        Raises:
            BenchmarkError: it cannot be loaded.
        """
        started = time.monotonic()
        try:
            http_request("POST", f"{self.management}/workflows?url={name}.war", b"", limit_s=_WORKFLOW_LIMIT_S)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise BenchmarkError(f"{self.name} cannot register {name}: {text}\n{self.last_lines()}") from error
        return time.monotonic() - started

    def scale(self, model: str, workers: int) -> float:
        """Asks for that many model workers; the seconds until the server says they are ready."""
        started = time.monotonic()
        query = f"min_worker={workers}&max_worker={workers}&synchronous=true"
        http_request("PUT", f"{self.management}/models/{model}?{query}")
        return time.monotonic() - started

    def _command(self, *arguments: str) -> int:
        commands = str(Path(self._torchserve[0]).parent)
        environment = {
            **os.environ,
            "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', '')}",
            "TMPDIR": str(self.folder / "tmp"),
            "TEMP": str(self.folder / "tmp"),
            "LOG_LOCATION": str(self.folder / "logs"),
            "METRICS_LOCATION": str(self.folder / "logs"),
            **self._environment,
        }
        with self.log.open("ab") as log:
            return subprocess.run(
                [*self._torchserve, *arguments],
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                check=False, timeout=STOP_LIMIT_S,
            ).returncode  # fmt: skip


def _model(model: str, batch_size: int, max_batch_delay_ms: int, workers: int) -> dict[str, Any]:
    return {
        "defaultVersion": True,
        "marName": f"{model}.mar",
        "minWorkers": workers,
        "maxWorkers": workers,
        "batchSize": batch_size,
        "maxBatchDelay": max_batch_delay_ms,
        "responseTimeout": 120,
    }


class OurServer(ArchiveServer):
    """wsgi-ts, which answers before all of it has started: what it loads then must not be measured with requests."""

    def __enter__(self) -> OurServer:
        """As any server, and waits until it says that it has started."""
        super().__enter__()
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while _STARTED not in self.log.read_text(errors="replace"):
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"{self.name} has not started:\n{self.last_lines()}")
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise
        return self


def our_server(*, source: Path = PROJECT, batch_size: int = 32, web_workers: int = 2, **options: Any) -> ArchiveServer:
    """The server of a source tree, run with this interpreter and without being installed.

    Args:
        source: the tree.
        batch_size: of the models.
        web_workers: of the inference API.
        options: further ones of `ArchiveServer`; `settings` are added to the number of web workers.
    """
    settings = {"web_workers": str(web_workers), **options.pop("settings", {})}
    return OurServer(
        OURS,
        (sys.executable, "-m", "wsgi_ts.cli"),
        batch_size=batch_size,
        max_batch_delay_ms=5,
        settings=settings,
        environment={"PYTHONPATH": str(source), **options.pop("environment", {})},
        **options,
    )


def archive_models(models: Sequence[str]) -> None:
    """Makes the archives of some of `FILES`, which both servers load."""
    for model in models:
        handler, *extra_files = (BENCHMARKS / "apps" / file for file in FILES[model])
        archive(model, handler, extra_files=extra_files)


def archive(
    model: str, handler: Path, *, config: Mapping[str, Any] | None = None, extra_files: Sequence[Path] = ()
) -> None:
    """Makes a model archive in the store, in place of the one that may be there.

    Args:
        model: its name.
        handler: file of the handler.
        config: content of its model-config.yaml.
        extra_files: further files of the archive.
    """
    STORE.mkdir(parents=True, exist_ok=True)
    (STORE / f"{model}.mar").unlink(missing_ok=True)
    command = [str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", model, "--version", "1.0"]
    command += ["--handler", str(handler), "--export-path", str(STORE)]
    if extra_files:
        command += ["--extra-files", ",".join(map(str, extra_files))]
    if config is not None:
        path = WORK / f"{model}-model-config.yaml"
        path.write_text(json.dumps(config, indent=2))
        command += ["--config-file", str(path)]
    subprocess.run(command, check=True)
