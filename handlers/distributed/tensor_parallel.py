"""A model whose matrices are shared out among ranks: tensor parallelism for `parallelType` tp and pptp.

Every rank's handler gets every request and calls the model with the same inputs; each rank computes a part of each
layer, and sums go between them (torch.distributed.tensor.parallel). All ranks get the whole result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from wsgi_ts.handlers.distributed.ranks import DistributedHandler, join_process_group, parallel_sizes, rank_device
from wsgi_ts.handlers.serving.context import Context

#: Names of the matrices of blocks in the manner of Llama, as transformers and as Meta spell them: those whose outputs
#: are shared out, and those that sum up what these gave.
_COLUMNS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "wq", "wk", "wv", "w1", "w3"})
_ROWS = frozenset({"o_proj", "down_proj", "wo", "w2"})
_QUERIES = ("q_proj", "wq")
#: The matrix that makes scores of words.
_HEADS = ("lm_head", "output")
#: Where attention modules keep how many heads they have: each rank has its share of them.
_HEAD_COUNTS = (
    "num_heads",
    "num_key_value_heads",
    "num_attention_heads",
    "n_heads",
    "n_kv_heads",
    "n_local_heads",
    "n_local_kv_heads",
)


class BaseTensorParallelHandler(DistributedHandler):
    """The handler to derive from for `parallelType: tp` or `pptp`.

    `initialize` of the base class joins the ranks and chooses the device; yours loads the model and gives it to
    `get_tensor_parallel_model` (tp) or `get_pipeline_driver` (pptp). `handle` is called on every rank with the same
    rows, and rank 0's results are the answers: draw random numbers from the same seed on every rank, or none.
    """


def get_tensor_parallel_model(model: nn.Module, context: Context, plan: Mapping[str, Any] | None = None) -> nn.Module:
    """Shares a model out among all ranks of the group and moves this rank's part to its device.

    Args:
        model: the whole model, on the CPU, with the same weights in all processes. It is changed.
        context: the handler's context.
        plan: see `parallelize`.

    Returns:
        This rank's part, in evaluation mode; it takes the whole batch (B, …) and returns the whole result.

    Raises:
        ValueError: the model cannot be shared out among so many ranks, or there is no plan for it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = rank_device(int(os.environ.get("LOCAL_RANK", "0")), context)
    join_process_group(device, world_size, context)
    _, tp_size = parallel_sizes(world_size, context)
    if tp_size > 1:
        parallelize(model, tensor_mesh(device, world_size // tp_size, tp_size), plan)
    return model.to(device).eval()


def tensor_mesh(device: torch.device, pp_size: int, tp_size: int) -> DeviceMesh:
    """Returns the ranks that share a stage with this one: rank is stage * tp_size + place."""
    return init_device_mesh(device.type, (pp_size, tp_size), mesh_dim_names=("pp", "tp"))["tp"]


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, Any] | None = None) -> None:
    """Shares a model's matrices out, in place; each rank keeps its part of them.

    Args:
        model: the model, or a stage of it, with the same weights on all ranks.
        mesh: the ranks.
        plan: for `torch.distributed.tensor.parallel.parallelize_module`: names of modules, `*` for one part of a name,
            and how each is shared out. Without it blocks in the manner of Llama are known.

    Raises:
        ValueError: a number of heads is not a multiple of the number of ranks, or no such blocks were found.
    """
    chosen: dict[str, ParallelStyle] = dict(plan) if plan is not None else _ready_plan(model, mesh.size())
    model.requires_grad_(False)
    # None: every rank cuts its part out of weights it has, instead of getting it from rank 0.
    parallelize_module(model, mesh, chosen, src_data_rank=None)


class Columns(ParallelStyle):
    """Gives each rank a part of a linear layer's outputs. Plain tensors, where `ColwiseParallel` has distributed ones.

    `gather`: the outputs of all ranks are put together again; their number must be a multiple of the ranks'.
    """

    def __init__(self, *, gather: bool = False) -> None:
        self._gather = gather

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        _keep_part(module, 0, device_mesh)
        if module.bias is not None:
            module.bias = _part(module.bias, 0, device_mesh)
        if self._gather:
            group, ranks = device_mesh.get_group(), device_mesh.size()

            def join(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
                parts = [torch.empty_like(output) for _ in range(ranks)]
                dist.all_gather(parts, output.contiguous(), group=group)
                return torch.cat(parts, dim=-1)

            module.register_forward_hook(join)
        return module


class Rows(ParallelStyle):
    """Gives each rank a part of a linear layer's inputs, those that `Columns` leaves it, and sums up."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        _keep_part(module, 1, device_mesh)
        if device_mesh.get_local_rank():
            module.register_parameter("bias", None)  # added once, by the first rank
        group = device_mesh.get_group()

        def add_up(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(output, group=group)
            return output

        module.register_forward_hook(add_up)
        return module


def _keep_part(module: nn.Linear, dimension: int, mesh: DeviceMesh) -> None:
    module.weight = _part(module.weight, dimension, mesh)
    module.out_features, module.in_features = module.weight.shape


def _part(parameter: torch.Tensor, dimension: int, mesh: DeviceMesh) -> nn.Parameter:
    part = parameter.detach().tensor_split(mesh.size(), dimension)[mesh.get_local_rank()]
    # A copy, so that the whole can go.
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _ready_plan(model: nn.Module, ranks: int) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {}
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding) and module._parameters}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or "weight" not in module._parameters:
            continue
        parent_path, _, name = path.rpartition(".")
        if name in _COLUMNS:
            plan[path] = Columns()
        elif name in _ROWS:
            plan[path] = Rows()
        elif name in _HEADS and id(module.weight) not in tied and not module.out_features % ranks:
            plan[path] = Columns(gather=True)
        if name in _QUERIES:
            _share_heads(model.get_submodule(parent_path), parent_path, ranks)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no blocks in the manner of Llama (q_proj, k_proj, v_proj, o_proj, gate_proj, "
            "up_proj, down_proj): say how to share it out, with a plan for parallelize_module"
        )
    return plan


def _share_heads(attention: nn.Module, path: str, ranks: int) -> None:
    """Gives an attention module its share of the heads, where it keeps their number."""
    config = getattr(attention, "config", None)
    for name in _HEAD_COUNTS:
        for owner in (attention, config):
            count = getattr(owner, name, None)
            if isinstance(count, int) and count % ranks:
                raise ValueError(
                    f"{path}: {name} is {count}, which cannot be shared out among {ranks} ranks: start as "
                    "many processes as divide it (torchrun.nproc-per-node, tensor_parallel.tp_size)"
                )
        count = getattr(attention, name, None)
        if isinstance(count, int):
            setattr(attention, name, count // ranks)
