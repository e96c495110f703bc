"""Model workers on real GPUs: where they are placed, what they hold, and what a death or a CUDA error leaves behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

from wsgi_ts.gpu.devices import gpu_loads

pytestmark = pytest.mark.needs_gpu

#: Holds HELD_MB of its GPU. The body `oom` asks for more than any GPU has, `assert` breaks the CUDA context.
HELD_MB = 1024
ON_GPU = f"""
import json, os
import torch

class OnGpu:
    def initialize(self, context):
        self.gpu = context.system_properties["gpu_id"]
        self.device = torch.device("cpu" if self.gpu is None else f"cuda:{{self.gpu}}")
        self.held = torch.ones({HELD_MB} << 18, device=self.device)

    def handle(self, data, context):
        words = [bytes(row["body"]) for row in data]
        if b"oom" in words:
            torch.empty(1 << 50, dtype=torch.uint8, device=self.device)
        if b"assert" in words:
            torch.zeros(2, device=self.device)[torch.tensor([9], device=self.device)].cpu()
        ones = self.held[:1000].sum().item()
        return [json.dumps({{"gpu": self.gpu, "ones": ones, "pid": os.getpid()}})] * len(data)
"""
#: A group of one rank, over NCCL.
ONE_RANK = """
import json, os
import torch
import torch.distributed as dist

class OneRank:
    def initialize(self, context):
        self.gpu = context.system_properties["gpu_id"]
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(self.device)
        dist.init_process_group("nccl")
        self.weights = torch.eye(256, device=self.device)

    def handle(self, data, context):
        sizes = torch.tensor([float(len(row["body"])) for row in data], device=self.device)
        dist.all_reduce(sizes)
        trace = (self.weights @ self.weights).trace().item()
        return [json.dumps({
            "size": size, "trace": trace, "gpu": self.gpu, "visible": os.environ["CUDA_VISIBLE_DEVICES"],
            "seen": torch.cuda.device_count(), "ranks": dist.get_world_size(), "pid": os.getpid(),
        }) for size in sizes.tolist()]
"""


@pytest.fixture(scope="module")
def idle_mb(gpus: int) -> float:
    """Memory that is in use before the server has a model."""
    return used_mb(gpus)


@pytest.fixture(scope="module")
def server(idle_mb: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "ongpu", ON_GPU)
    archive(store, "oncpu", ON_GPU, config_yaml="deviceType: cpu\n")
    one_rank = {"parallelType": "tp", "deviceType": "gpu", "torchrun": {"nproc-per-node": 1}}
    archive(store, "onerank", ONE_RANK, config_yaml=json.dumps({"minWorkers": 1, "maxWorkers": 1, **one_rank}))
    with ServerProcess(store=store) as server:
        yield server


@pytest.fixture
def ongpu(server: ServerProcess) -> Iterator[ServerProcess]:
    """The server with one worker of `ongpu`."""
    assert server.register("ongpu.mar").status == 200
    yield server
    assert server.request("management", "DELETE", "/models/ongpu").status == 200


def answer(server: ServerProcess, model: str, body: str = "x") -> dict[str, Any]:
    """A model's answer."""
    reply = server.predict(model, body)
    assert reply.status == 200, reply.text
    return dict(reply.json())


def used_mb(gpus: int) -> float:
    """Memory in use on all GPUs, by whomever."""
    loads = gpu_loads(gpus)
    assert len(loads) == gpus, "nvidia-smi does not tell the GPUs' memory"
    return sum(load["GPUMemoryUsed"] for load in loads)


def test_a_worker_computes_on_the_gpu_that_describe_names(ongpu: ServerProcess, gpus: int) -> None:
    found = answer(ongpu, "ongpu")
    assert found["ones"] == 1000.0
    # TorchServe counts before it assigns: of several GPUs the first worker gets number 1. Others may have had theirs.
    assert found["gpu"] in range(gpus)
    worker = ongpu.request("management", "GET", "/models/ongpu").json()[0]["workers"][0]
    assert worker["gpu"] is True
    assert worker["gpuUsage"].startswith(f"gpuId::{found['gpu']} utilization.gpu [%]::")


def test_workers_go_round_the_gpus(ongpu: ServerProcess, gpus: int) -> None:
    scaled = ongpu.request("management", "PUT", f"/models/ongpu?min_worker={gpus + 1}&synchronous=true", timeout=120)
    assert scaled.status == 200, scaled.text
    described = ongpu.request("management", "GET", "/models/ongpu").json()[0]["workers"]
    assert [worker["gpu"] for worker in described] == [True] * (gpus + 1)
    named = {worker["gpuUsage"].split()[0] for worker in described}
    assert named == {f"gpuId::{number}" for number in range(gpus)}


def test_a_model_for_the_cpu_gets_no_gpu(server: ServerProcess) -> None:
    assert server.register("oncpu.mar").status == 200
    assert answer(server, "oncpu")["gpu"] is None
    assert server.request("management", "DELETE", "/models/oncpu").status == 200


def test_a_group_of_one_rank_computes_over_nccl(server: ServerProcess) -> None:
    reply = server.register("onerank.mar")
    assert reply.status == 200, reply.text
    found = answer(server, "onerank", "hello")
    assert (found["size"], found["trace"], found["ranks"]) == (5.0, 256.0, 1)
    assert (found["gpu"], found["visible"], found["seen"]) == (0, "0", 1)
    described = server.request("management", "GET", "/models/onerank").json()[0]
    assert (described["parallelType"], described["parallelLevel"]) == ("tp", 1)
    assert described["workers"][0]["gpuIds"] == [0]
    os.kill(found["pid"], signal.SIGKILL)
    back = eventually(lambda: answer(server, "onerank", "again"), within=60, what="the group after its rank was killed")
    assert (back["size"], back["pid"] != found["pid"]) == (5.0, True)
    assert server.request("management", "DELETE", "/models/onerank").status == 200


def test_memory_of_a_killed_worker_is_free_for_the_next(ongpu: ServerProcess, gpus: int, idle_mb: float) -> None:
    pid = answer(ongpu, "ongpu")["pid"]
    for _ in range(3):
        os.kill(pid, signal.SIGKILL)
        pid = eventually(lambda: answer(ongpu, "ongpu"), within=60, what="the worker's next life")["pid"]
    assert used_mb(gpus) > idle_mb + HELD_MB
    # A driver takes a moment to give memory back. One worker holds HELD_MB and CUDA's context, which is smaller.
    eventually(lambda: used_mb(gpus) < idle_mb + 2 * HELD_MB, within=20, what="memory of the dead workers given back")


def test_unregistering_gives_all_memory_back(server: ServerProcess, gpus: int, idle_mb: float) -> None:
    assert server.register("ongpu.mar").status == 200
    answer(server, "ongpu")
    held_mb = used_mb(gpus) - idle_mb
    assert server.request("management", "DELETE", "/models/ongpu").status == 200
    assert held_mb > HELD_MB
    eventually(lambda: used_mb(gpus) < idle_mb + HELD_MB / 4, within=20, what="memory given back")


def test_out_of_memory_is_507_and_the_worker_lives_on(ongpu: ServerProcess) -> None:
    pid = answer(ongpu, "ongpu")["pid"]
    reply = ongpu.predict("ongpu", "oom")
    assert (reply.status, reply.json()["message"]) == (507, "Out of resources")
    assert answer(ongpu, "ongpu")["pid"] == pid


def test_a_broken_cuda_context_is_507_and_a_new_worker(ongpu: ServerProcess) -> None:
    pid = answer(ongpu, "ongpu")["pid"]
    reply = ongpu.predict("ongpu", "assert")
    assert (reply.status, reply.json()["message"]) == (507, "Out of resources")
    again = eventually(lambda: answer(ongpu, "ongpu"), within=60, what="a worker with a new context")
    assert (again["pid"] != pid, again["ones"]) == (True, 1000.0)
