"""Triton: the `tritonserver` program of the nvidia-pytriton wheel with its Python backend, the only backend in there.

Bodies are raw tensors (the raw binary request of the KServe v2 protocol's binary extension); JSON has the protocol's
own form.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from servers import BENCHMARKS, CommandServer, Rival, environment, free_ports

NAME = "triton"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
#: For each model, the file of its code and its tensors: type, shape of the input, shape of the output.
MODELS = {"echo": ("triton_echo.py", "TYPE_UINT8", -1, -1), "mlp": ("triton_mlp.py", "TYPE_FP32", 256, 10)}


class TritonServer(CommandServer):
    """The server with one instance of each model.

    Args:
        batch_size: of the dynamic batcher, which takes what waits and never waits itself; 0: no batching.
    """

    def __init__(self, *, batch_size: int) -> None:
        super().__init__(NAME, folder=NAME, models=("echo", "mlp", "json"))
        self._batch_size = batch_size

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """Only HTTP and metrics are on."""
        commands = environment(NAME, BENCHMARKS / "rivals" / "triton.txt")
        packages = commands.parent / "lib" / f"python{PYTHON}" / "site-packages"
        program = packages / "pytriton" / "tritonserver"
        repository = self._make_repository(packages)
        self._make_backend(program)
        words = [str(program / "bin" / "tritonserver"), "--model-repository", str(repository)]
        words += ["--backend-directory", str(self.folder / "backends"), "--disable-auto-complete-config"]
        words += ["--http-address", "127.0.0.1", "--http-port", str(self.port), "--allow-grpc", "false"]
        words += ["--metrics-address", "127.0.0.1", "--metrics-port", str(free_ports(1)[0])]
        # The stub embeds Python: it needs the library of this interpreter.
        libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        return words, {"LD_LIBRARY_PATH": libraries}

    def path(self, model: str) -> str:
        """The KServe v2 protocol."""
        return f"/v2/models/{'mlp' if model == 'json' else model}/infer"

    def headers(self, model: str) -> dict[str, str]:
        """A raw body has a JSON head of 0 bytes."""
        raw = {} if model == "json" else {"Inference-Header-Content-Length": "0"}
        return {**super().headers(model), **raw}

    def encode(self, model: str, body: bytes) -> bytes:
        """A list of numbers as a KServe v2 request."""
        if model != "json":
            return body
        numbers = json.loads(body)
        shape = [1, len(numbers)] if self._batch_size else [len(numbers)]
        return json.dumps({"inputs": [{"name": "INPUT", "shape": shape, "datatype": "FP32", "data": numbers}]}).encode()

    def decode(self, model: str, answer: bytes) -> bytes:
        """A raw tensor lies behind the answer's JSON head."""
        head, end = json.JSONDecoder().raw_decode(answer.decode("latin-1"))
        return json.dumps(head["outputs"][0]["data"]).encode() if model == "json" else answer[end:]

    def _make_backend(self, program: Path) -> None:
        """The Python backend, with the stub for this version of Python, which it looks for beside itself."""
        folder = self.folder / "backends" / "python"
        folder.mkdir(parents=True)
        stubs = program / "python_backend_stubs" / PYTHON
        for file in (*(program / "backends" / "python").iterdir(), *stubs.iterdir()):
            (folder / file.name).symlink_to(file)

    def _make_repository(self, packages: Path) -> Path:
        """The models' folders; their code finds the environment's packages."""
        repository = self.folder / "repository"
        for model, (code, kind, inputs, outputs) in MODELS.items():
            folder = repository / model
            (folder / "1").mkdir(parents=True)
            # The stub's interpreter does not look at PYTHONPATH. The environment comes first: with a numpy 2 from
            # elsewhere this Triton would send empty tensors.
            preamble = f"import sys\n\nsys.path.insert(0, {str(packages)!r})\n"
            (folder / "1" / "model.py").write_text(preamble + (BENCHMARKS / "apps" / code).read_text())
            shutil.copy(BENCHMARKS / "apps" / "mlp.py", folder / "1")
            # Bodies of different lengths may share a batch: the Python backend never joins them.
            ragged = "allow_ragged_batch: true" if self._batch_size and inputs < 0 else ""
            (folder / "config.pbtxt").write_text(
                f'name: "{model}"\nbackend: "python"\nmax_batch_size: {self._batch_size}\n'
                f'input [{{ name: "INPUT" data_type: {kind} dims: [{inputs}] {ragged} }}]\n'
                f'output [{{ name: "OUTPUT" data_type: {kind} dims: [{outputs}] }}]\n'
                f"instance_group [{{ count: 1 kind: KIND_CPU }}]\n" + "dynamic_batching {}\n" * bool(self._batch_size)
            )
        return repository


RIVAL = Rival(
    NAME,
    {"no batching": lambda: TritonServer(batch_size=0), "dynamic batching": lambda: TritonServer(batch_size=32)},
)
