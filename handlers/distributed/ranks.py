"""This process as one rank of a model that spans several: its numbers, its device, its process group."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from wsgi_ts.handlers.bundled.base import BaseHandler
from wsgi_ts.handlers.serving.context import Context

#: How long one exchange between ranks may take, in seconds, where `pippy: rpc_timeout` does not say.
DEFAULT_TIMEOUT_S = 1800


class LocalRank(int):
    """Number of a process on its machine, for handlers that choose their device as tutorials print it.

    `local_rank % torch.cuda.device_count()` is the number of a GPU, and the CPU where there is none.
    """

    def __mod__(self, devices: int) -> Any:
        return super().__mod__(devices) if devices else torch.device("cpu")


class DistributedHandler(BaseHandler):
    """What handlers of models that span several processes have in common.

    Its numbers are read where they are asked for: handlers do not always call our `__init__`, nor `initialize`.
    """

    @cached_property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return LocalRank(os.environ.get("LOCAL_RANK", "0"))

    @cached_property
    def rank(self) -> int:
        """Its number among all."""
        return int(os.environ.get("RANK", "0"))

    @cached_property
    def world_size(self) -> int:
        """How many there are; 1 in a model worker that is none of a group."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def initialize(self, context: Context) -> None:
        """Chooses this rank's device and joins the others. Loading the model is up to the derived class.

        Raises:
            ValueError: `pippy: rpc_timeout` is no number of seconds.
        """
        self._take_context(context)
        self.device = rank_device(self.local_rank, context)
        join_process_group(self.device, self.world_size, context)


class BasePippyHandler(DistributedHandler):
    """The handler to derive from for `parallelType: pp`.

    `initialize` of the base class joins the ranks and chooses the device; yours loads the model and gives it to
    `get_pipeline_driver`. `handle` is called on rank 0 only.
    """


def section(context: Context, name: str) -> dict[str, Any]:
    """Returns a section of the model's YAML, {} where it has none.

    Raises:
        ValueError: it is no section.
    """
    content = (context.model_yaml_config or {}).get(name)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"model-config.yaml: {name} should be a section of settings, and is {content!r}")
    return content


def rank_device(local_rank: int, context: Context) -> torch.device:
    """Returns this rank's own GPU among those that the group has, or the CPU where the model is not on GPUs."""
    if torch.cuda.is_available() and context.system_properties.get("gpu_id") is not None:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def group_backend(device: torch.device) -> str:
    """Returns the backends of a process group: lengths and shapes travel between CPUs even where tensors do not."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def join_process_group(device: torch.device, world_size: int, context: Context) -> None:
    """Joins torch's default process group, unless that is done or this process is alone.

    Raises:
        ValueError: `pippy: rpc_timeout` is no number of seconds.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1 or dist.is_initialized():
        return
    timeout_s = section(context, "pippy").get("rpc_timeout") or DEFAULT_TIMEOUT_S
    if not isinstance(timeout_s, int | float) or timeout_s <= 0:
        raise ValueError(f"model-config.yaml: pippy.rpc_timeout should be a number of seconds, and is {timeout_s!r}")
    dist.init_process_group(group_backend(device), timeout=timedelta(seconds=timeout_s))


def initialize_rpc_workers(local_rank: int, world_size: int, context: Context) -> None:
    """Connects the processes of the group; `get_pipeline_driver` does it where nobody has.

    `pippy: rpc_timeout` of the model's YAML (s) is how long an exchange between them may take.
    """
    join_process_group(rank_device(local_rank, context), world_size, context)


def parallel_type(context: Context) -> str:
    """Returns how the model is divided: pp, tp, pptp, or "" where nothing is said."""
    return str((context.model_yaml_config or {}).get("parallelType", "")).lower()


def parallel_sizes(world_size: int, context: Context) -> tuple[int, int]:
    """Returns the number of stages that a model is cut into, and of the ranks that share each of them.

    Raises:
        ValueError: under `parallelType: pptp`, `tensor_parallel: tp_size` is missing or does not divide the ranks.
    """
    kind = parallel_type(context)
    if kind == "tp":
        return 1, world_size
    if kind != "pptp":
        return world_size, 1
    tp_size = section(context, "tensor_parallel").get("tp_size")
    if not isinstance(tp_size, int) or tp_size < 1 or world_size % tp_size:
        raise ValueError(
            f"model-config.yaml: parallelType pptp needs tensor_parallel.tp_size, a divisor of the {world_size} "
            f"processes; it is {tp_size!r}"
        )
    return world_size // tp_size, tp_size
