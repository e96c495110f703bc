"""The two servers under test, behind one interface: install, start, look at, stop.

Both are started by their own `torchserve` command with the same kind of configuration file, so nothing here knows how
either works inside. Each has its own temporary folder, log folder and free ports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

BENCHMARKS = Path(__file__).resolve().parent
PROJECT = BENCHMARKS.parent
WORK = BENCHMARKS / ".work"
STORE = WORK / "model-store"

TORCHSERVE_PACKAGES = (
    "torchserve==0.12.0",
    "torch-model-archiver==0.12.0",
    "torch",  # the version that requirements/pins.txt names for both
    "numpy",
    "pyyaml",
    "setuptools",
)
#: The models of `archive_models`.
MODELS = ("echo", "torchmodel")
LARGEST_BODY_BYTES = 20_000_000
START_LIMIT_S = 180.0
STOP_LIMIT_S = 90.0


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text says what to do."""


class Server:
    """A running server. A context manager: leaving it stops the server.

    Args:
        name: "wsgi-ts" or "torchserve".
        executables: the folder of its `torchserve` command.
        batch_size: of the models that it starts with.
        max_batch_delay_ms: of the same.
        settings: further lines of its configuration file.
        models: those it starts with.
    """

    def __init__(
        self,
        name: str,
        executables: Path,
        *,
        batch_size: int,
        max_batch_delay_ms: int,
        settings: dict[str, str] | None = None,
        models: Sequence[str] = MODELS,
    ) -> None:
        self.name = name
        self._models = models
        self._executables = executables
        self._folder = WORK / f"run-{name}"
        ports = free_ports(5)
        self.inference = f"http://127.0.0.1:{ports[0]}"
        self.management = f"http://127.0.0.1:{ports[1]}"
        self._settings = {
            "inference_address": self.inference,
            "management_address": self.management,
            "metrics_address": f"http://127.0.0.1:{ports[2]}",
            "grpc_inference_port": str(ports[3]),
            "grpc_management_port": str(ports[4]),
            "disable_token_authorization": "true",
            "job_queue_size": "1000",
            "max_request_size": str(LARGEST_BODY_BYTES),
            "max_response_size": str(LARGEST_BODY_BYTES),
            "models": json.dumps(
                {
                    model: {
                        "1.0": {
                            "defaultVersion": True,
                            "marName": f"{model}.mar",
                            "minWorkers": 1,
                            "maxWorkers": 1,
                            "batchSize": batch_size,
                            "maxBatchDelay": max_batch_delay_ms,
                            "responseTimeout": 120,
                        }
                    }
                    for model in models
                }
            ),
            **(settings or {}),
        }
        self.first_answer_s = 0.0

    def __enter__(self) -> Server:
        """Starts the server and waits for its first model's first answer (see `first_answer_s`), then for the others'.

        Raises:
            BenchmarkError: it ended, or was not ready in time.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "tmp").mkdir(parents=True)
        config = self._folder / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in self._settings.items()))
        started = time.monotonic()
        with self._log.open("wb") as log:
            status = self._command(
                "--start", "--ncs", "--model-store", str(STORE), "--ts-config", str(config),
                "--models", *(f"{model}={model}.mar" for model in self._models), log=log,
            )  # fmt: skip
        if status:
            raise BenchmarkError(f"{self.name} did not start (exit status {status}):\n{self._last_lines()}")
        try:
            first, *others = self._models
            self._wait_for_answer(first, b"hello", started)
            self.first_answer_s = time.monotonic() - started
            for model in others:
                self._wait_for_answer(model, b"hello", started)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the server and waits until all its processes have gone."""
        self._stop()

    def predict(self, model: str, body: bytes) -> bytes:
        """One prediction; raises OSError (urllib's errors are) where the answer is not a 200."""
        return _request("POST", f"{self.inference}/predictions/{model}", body)

    def describe(self, model: str) -> dict[str, Any]:
        """The management API's description of a model."""
        answer: list[dict[str, Any]] = json.loads(_request("GET", f"{self.management}/models/{model}"))
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
                    _request("POST", f"{self.management}/models?url={model}.mar&synchronous=true", b"")
                except urllib.error.HTTPError as error:
                    text = error.read().decode(errors="replace")
                    raise BenchmarkError(f"{self.name} cannot load {model}: {text}\n{self._last_lines()}") from error
            yield
        finally:
            for model in models:
                with suppress(OSError):  # not registered, or the server is gone, which has been told of
                    _request("DELETE", f"{self.management}/models/{model}")

    def scale(self, model: str, workers: int) -> float:
        """Asks for that many model workers; the seconds until the server says they are ready."""
        started = time.monotonic()
        query = f"min_worker={workers}&max_worker={workers}&synchronous=true"
        _request("PUT", f"{self.management}/models/{model}?{query}")
        return time.monotonic() - started

    def processes(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        top = psutil.Process(self._pid())
        return [top, *top.children(recursive=True)]

    @property
    def _log(self) -> Path:
        return self._folder / "server.log"

    def _pid(self) -> int:
        return int((self._folder / "tmp" / ".model_server.pid").read_text())

    def _command(self, *arguments: str, log: Any) -> int:
        environment = {
            **os.environ,
            "PATH": f"{self._executables}{os.pathsep}{os.environ.get('PATH', '')}",
            "TMPDIR": str(self._folder / "tmp"),
            "TEMP": str(self._folder / "tmp"),
            "LOG_LOCATION": str(self._folder / "logs"),
            "METRICS_LOCATION": str(self._folder / "logs"),
        }
        return subprocess.run(
            [str(self._executables / "torchserve"), *arguments],
            cwd=self._folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            check=False, timeout=STOP_LIMIT_S,
        ).returncode  # fmt: skip

    def _wait_for_answer(self, model: str, body: bytes, started: float) -> None:
        while True:
            try:
                self.predict(model, body)
                return
            except OSError as error:
                if not self._runs():
                    raise BenchmarkError(
                        f"{self.name} has ended while it was starting:\n{self._last_lines()}"
                    ) from error
                if time.monotonic() - started > START_LIMIT_S:
                    raise BenchmarkError(
                        f"{self.name} gave no answer from {model} within {START_LIMIT_S:.0f} s ({error}):\n"
                        f"{self._last_lines()}"
                    ) from error
                time.sleep(0.01)

    def _runs(self) -> bool:
        try:
            return psutil.Process(self._pid()).status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, psutil.Error):
            return False

    def _stop(self) -> None:
        try:
            processes = self.processes()
        except (OSError, ValueError, psutil.Error):
            processes = []
        with self._log.open("ab") as log:
            self._command("--stop", "--foreground", log=log)
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            process.kill()

    def _last_lines(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _request(method: str, url: str, body: bytes | None = None) -> bytes:
    headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        content: bytes = answer.read()
        return content


# -- what the measurements need before they begin


def install_torchserve() -> Path:
    """TorchServe in a virtual environment of its own, made once; the folder of its commands."""
    folder = WORK / "torchserve"
    stamp = folder / ".installed"
    if not stamp.exists():
        print("==> installing TorchServe 0.12 into benchmarks/.work/torchserve (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = ("-c", str(PROJECT / "requirements" / "pins.txt"))
        subprocess.run(
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *constraints, *TORCHSERVE_PACKAGES],
            check=True,
        )
        stamp.touch()
    return folder / "bin"


def archive_models() -> None:
    """The model archives that both servers load."""
    for model, handler in zip(MODELS, ("echo_handler.py", "torch_handler.py"), strict=True):
        archive(model, BENCHMARKS / handler)


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


def check_tools(*, with_java: bool) -> None:
    """Looks for the programs that are needed besides Python.

    Raises:
        BenchmarkError: one is missing.
    """
    if shutil.which("wrk") is None:
        raise BenchmarkError("wrk is missing (Debian, Ubuntu: apt-get install wrk; macOS: brew install wrk).")
    if not with_java:
        return
    if shutil.which("java") is None:
        raise BenchmarkError(
            "TorchServe needs Java 11 or newer (Debian, Ubuntu: apt-get install default-jre-headless); "
            "`--only wsgi-ts` goes without."
        )
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version.group(1)) < 11:
        raise BenchmarkError(f"TorchServe needs Java 11 or newer; this is:\n{said}")
