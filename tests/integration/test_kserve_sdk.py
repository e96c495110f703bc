"""KServe's own Python package against the server: its clients, and a wrapper of the kind that TorchServe's image has.

The package lives in a virtual environment of its own, which `make kserve` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess, free_ports

pytestmark = pytest.mark.slow

#: The digit that an image says in its first byte; of a tensor, its first element.
MNIST = """
import base64

def digit(row):
    value = row.get("data", row) if isinstance(row, dict) else row
    if isinstance(value, str):
        value = base64.b64decode(value)
    return int(value[0]) if hasattr(value, "__len__") else int(value)

def handle(data, context):
    if data is None:
        return None
    return [digit(row) for row in data]
"""

#: The same, which raises what it is told to.
PLAIN = """
from ts.utils.util import PredictionException
""" + MNIST.replace(
    "    return [digit(row) for row in data]",
    """    for row in data:
        if isinstance(row, dict) and "raise" in row:
            raise PredictionException("raised", int(row["raise"]))
    return [digit(row) for row in data]""",
)

#: Runs inside the environment: each client says what it has got.
CLIENTS = """
import asyncio, json, sys
import numpy
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

http_port, grpc_port = sys.argv[1:]
url, image = f"http://127.0.0.1:{http_port}", "AgAA"

async def main():
    found = {}
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        found["v1 ready"] = await client.is_model_ready(url, "mnist")
        found["v1"] = await client.infer(url, {"instances": [{"data": image}]}, model_name="mnist")
        found["v1 explain"] = await client.explain(url, "mnist", {"instances": [{"data": image}]})
        try:
            await client.infer(url, {"instances": []}, model_name="none")
        except Exception as error:
            found["v1 error"] = f"{type(error).__name__} {error}"[:60]
    tensor = InferInput(name="input-0", shape=[3], datatype="INT64", data=[1, 2, 3])
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        found["v2 live"] = await client.is_server_live(url)
        found["v2 ready"] = await client.is_server_ready(url)
        found["v2 model ready"] = await client.is_model_ready(url, "mnist_v2")
        asked = InferRequest(model_name="mnist_v2", infer_inputs=[tensor])
        answer = await client.infer(url, asked, model_name="mnist_v2")
        found["v2"] = [answer.model_name, answer.outputs[0].as_numpy().tolist()]
    async with InferenceGRPCClient(f"127.0.0.1:{grpc_port}") as client:
        found["grpc live"] = await client.is_server_live()
        found["grpc ready"] = await client.is_server_ready()
        found["grpc model ready"] = await client.is_model_ready("mnist_v2")
        raw = InferInput(name="input-0", shape=[3], datatype="INT64")
        raw.set_data_from_numpy(numpy.array([4, 5, 6]), binary_data=True)
        for name, each in (("grpc", tensor), ("grpc raw", raw)):
            answer = await client.infer(InferRequest(model_name="mnist_v2", infer_inputs=[each]))
            found[name] = answer.outputs[0].as_numpy().tolist()
    print(json.dumps(found))

asyncio.run(main())
"""

#: A server of KServe's with models that pass requests on to TorchServe, as the wrapper in its image does.
WRAPPER = """
import sys
import httpx
import kserve

http_port, management_port, own_port, own_grpc_port = sys.argv[1:]

class PassedOn(kserve.Model):
    def __init__(self, name):
        super().__init__(name)
        self.load()

    def load(self):
        # As the wrapper does: until a worker is ready.
        path = f"/models/{self.name}?customized=false"
        described = httpx.get(f"http://127.0.0.1:{management_port}{path}", timeout=60).json()
        self.ready = any(worker["status"] == "READY" for worker in described[0]["workers"])
        return self.ready

    async def predict(self, payload, headers=None, response_headers=None):
        # A request of the second protocol comes as an object, over REST and gRPC.
        is_second = isinstance(payload, kserve.InferRequest)
        path = f"/v2/models/{self.name}/infer" if is_second else f"/v1/models/{self.name}:predict"
        async with httpx.AsyncClient(timeout=60) as client:
            body = payload.to_rest()[0] if is_second else payload
            answer = await client.post(f"http://127.0.0.1:{http_port}{path}", json=body)
        answer.raise_for_status()
        return kserve.InferResponse.from_rest(answer.json()) if is_second else answer.json()

server = kserve.ModelServer(http_port=int(own_port), grpc_port=int(own_grpc_port), workers=1)
server.start([PassedOn("mnist"), PassedOn("mnist_v2")])
"""

#: Asks it as KServe's own tests for TorchServe's runtime do: one image for v1, a tensor for v2 over REST and gRPC.
WRAPPER_CLIENT = """
import asyncio, json, sys
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

http_port, grpc_port = sys.argv[1:]
url, tensor = f"http://127.0.0.1:{http_port}", InferInput(name="input-0", shape=[1], datatype="INT64", data=[2])

async def main():
    found = {}
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        found["v1"] = await client.infer(url, {"instances": [{"data": "AmltYWdl"}]}, model_name="mnist")
    asked = InferRequest(model_name="mnist_v2", infer_inputs=[tensor])
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        answer = await client.infer(url, asked, model_name="mnist_v2")
        found["v2"] = answer.outputs[0].as_numpy().tolist()
    async with InferenceGRPCClient(f"127.0.0.1:{grpc_port}") as client:
        answer = await client.infer(InferRequest(model_name="mnist_v2", infer_inputs=[tensor]))
        found["grpc"] = answer.outputs[0].as_numpy().tolist()
    print(json.dumps(found))

asyncio.run(main())
"""


#: A server of KServe's with model archives in engines of ours.
MAR_MODELS = """
import sys
import kserve
from wsgi_ts.integrations.kserve import MarModel

http_port, grpc_port, folder = sys.argv[1:]
server = kserve.ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1)
server.start([
    MarModel("mnist", folder + "/plain.mar", settings={"preload_modules": ""}),
    MarModel("mnist_v2", folder + "/plain.mar", envelope="kservev2", settings={"preload_modules": ""}),
])
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with KServe's package."""
    made = Path(sys.prefix) / "kserve"
    if not (made / ".installed").exists():
        pytest.skip("KServe's package is not installed: make kserve")
    return made / "bin" / "python"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "mnist", MNIST, manifest_overrides={"envelope": "kserve"})
    archive(store, "mnist_v2", MNIST, manifest_overrides={"envelope": "kservev2"})
    with ServerProcess(store=store, config={"ts_open_inference_protocol": "true"}) as running:
        for name in ("mnist", "mnist_v2"):
            assert running.register(f"{name}.mar").status == 200
        yield running


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TS_"))}


def run(python: Path, code: str, *arguments: int) -> Any:
    """Runs a client in the environment; returns what it has found."""
    command = [python, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_clients_of_all_protocols(server: ServerProcess, python: Path) -> None:
    found = run(python, CLIENTS, *(server.ports[name] for name in ("inference", "grpc_inference")))
    assert found.pop("v1 error").startswith("HTTPStatusError"), found
    assert found == {
        "v1 ready": True,
        "v1": {"predictions": [2]},
        "v1 explain": {"explanations": [2]},
        "v2 live": True,
        "v2 ready": True,
        "v2 model ready": True,
        "v2": ["mnist_v2", [1]],
        "grpc live": True,
        "grpc ready": True,
        "grpc model ready": True,
        "grpc": [1],
        "grpc raw": [4],
    }


def test_a_wrapper_in_front(server: ServerProcess, python: Path) -> None:
    """The bodies of KServe's own tests for TorchServe's runtime."""
    own = free_ports(2)
    ports = [str(each) for each in (server.ports["inference"], server.ports["management"], *own)]
    with subprocess.Popen([python, "-c", WRAPPER, *ports], env=environment(), stderr=subprocess.DEVNULL) as wrapper:
        try:

            def is_ready() -> bool:
                assert wrapper.poll() is None
                try:
                    return http.request(own[0], "GET", "/v2/models/mnist_v2/ready").status == 200
                except OSError:
                    return False

            eventually(is_ready, within=60)
            assert run(python, WRAPPER_CLIENT, *own) == {"v1": {"predictions": [2]}, "v2": [2], "grpc": [2]}
        finally:
            wrapper.kill()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for that of a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="wts-", dir="/tmp") as folder:
        yield Path(folder)


def test_archives_in_kserves_own_server(python: Path, tmp_path: Path, short_folder: Path) -> None:
    """Its clients, the errors that a handler raises, and the end, which leaves nothing."""
    archive(tmp_path, "plain", PLAIN)
    ports = free_ports(2)
    # As in an environment that has both packages; KServe's wants its own versions of what ours takes, too.
    packages = [*python.parents[1].glob("lib/python3*/site-packages"), Path(pytest.__file__).parents[1]]
    mine = {"PYTHONPATH": os.pathsep.join(map(str, [REPOSITORY, *packages])), "TMPDIR": str(short_folder)}
    command = [python, "-c", MAR_MODELS, *map(str, ports), str(tmp_path)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment() | mine, stderr=output, stdout=output)
    try:

        def is_ready() -> bool:
            assert server.poll() is None, log.read_text()
            try:
                return all(
                    http.request(ports[0], "GET", f"/v2/models/{name}/ready").status == 200
                    for name in ("mnist", "mnist_v2")
                )
            except OSError:
                return False

        eventually(is_ready, within=90)
        found = run(python, CLIENTS, *ports)
        assert found.pop("v1 error").startswith("HTTPStatusError"), found
        assert (found["v1"], found["v1 explain"]) == ({"predictions": [2]}, {"explanations": [2]})
        assert (found["v2"], found["grpc"], found["grpc raw"]) == (["mnist_v2", [1]], [1], [4])
        for value, status, told in (
            (400, 400, "raised"),
            (418, 418, "raised"),
            ("no number", 503, "Prediction failed"),
        ):
            body = json.dumps({"instances": [{"raise": value}]})
            headers = {"content-type": "application/json"}
            reply = http.request(ports[0], "POST", "/v1/models/mnist:predict", headers=headers, body=body)
            assert (reply.status, told in reply.text) == (status, True), reply.text
        server.terminate()
        assert server.wait(90) == 0, log.read_text()
        assert not list(short_folder.glob("wsgi-ts-*/*")), "no run directory of an engine"
    finally:
        server.kill()
        server.wait()
