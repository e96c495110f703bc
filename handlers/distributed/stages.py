"""Cuts a model into stages at its list of layers, in place; each stage runs the model's own `forward`.

A stage keeps its layers. Those before them hand on what was received, and after its last one `forward` is left. So
masks, positions and whatever else a model computes from its inputs is computed by each stage for itself, by the
model's own code, for any length and batch size; only hidden states travel.

Of what stands outside of the layers a stage keeps little: embeddings before them are the first stage's, what is
registered behind them is the last one's. Stand-ins of embeddings give NaN, so that a model that uses them for more
than the first layer's input shows it.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: A module with its parent and its name there.
_Unit = tuple[nn.Module, str, Any]


class _LeftStage(BaseException):
    """Leaves a model's `forward` with the output of the stage's last layer; no `except Exception` stops it."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@dataclass(frozen=True)
class Cut:
    """Where a model is cut.

    Attributes:
        name: the list of layers, as `model.get_submodule` takes it.
        starts: number of each stage's first layer.
        largest: size of the largest stage, in bytes.
    """

    name: str
    starts: tuple[int, ...]
    count: int
    largest: int


class Stage:
    """One stage of a model, which is changed, and loses the parameters of the other stages."""

    def __init__(self, model: nn.Module, cut: Cut, number: int, device: torch.device) -> None:
        self.model = model
        self.first_layer = cut.starts[number]
        self.is_last = number == len(cut.starts) - 1
        self._received: Any = None
        if len(cut.starts) > 1:
            if number:
                _replace_embeddings(model, cut.name, device)
            if not self.is_last:
                _drop_what_follows(model, cut.name)
            self._keep_layers(model.get_submodule(cut.name), cut, number)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], received: Any) -> Any:
        """Runs this stage's part of `model(*args, **kwargs)`, all but the first on what the stage before returned.

        Returns:
            What the next stage is to receive, or, from the last stage, what the model returns.
        """
        self._received = received
        try:
            return self.model(*args, **kwargs)
        except _LeftStage as left:
            return left.output
        finally:
            self._received = None

    def _keep_layers(self, layers: nn.Module, cut: Cut, number: int) -> None:
        """Makes the layers of stages before hand on what was received, and leaves `forward` after the last own one."""
        end = cut.count if self.is_last else cut.starts[number + 1]
        slots: dict[str, Any] = layers._modules
        for index, (name, layer) in enumerate(list(slots.items())):
            if index < self.first_layer:
                slots[name] = _shell(layer, lambda *args, **kwargs: self._received)
            elif index >= end:
                slots[name] = _shell(layer, _not_here(f"layer {index} of {cut.name}"))
            elif index == end - 1 and not self.is_last:
                # A copy, since a model may use one layer several times.
                last = copy.copy(layer)
                last._forward_hooks = OrderedDict(layer._forward_hooks)
                last.register_forward_hook(_leave)
                slots[name] = last


def find_cut(model: nn.Module, stages: int) -> Cut:
    """Returns where to cut a model so that its largest stage is as small as possible.

    Raises:
        ValueError: the model has no list of as many layers, or is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, which is not one chain of layers and cannot be cut into "
            "stages: use parallelType tp"
        )
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    cuts = [_cut(model, name, list(module), stages) for name, module in lists.items() if len(module) >= stages]
    if not cuts:
        longest = max(map(len, lists.values()), default=0)
        raise ValueError(
            f"{type(model).__name__} cannot be cut into {stages} stages: its longest list of layers (nn.ModuleList or "
            f"nn.Sequential) has {longest}. Start fewer processes (torchrun.nproc-per-node)"
        )
    return min(cuts, key=lambda cut: cut.largest)


def _cut(model: nn.Module, name: str, layers: Sequence[nn.Module], stages: int) -> Cut:
    before = sum(_size(embedding) for _, _, embedding in _embeddings_before(model, name))
    behind = sum(_size(unit) for _, _, unit in _units(model, name)[1])
    sizes = [_size(layer) for layer in layers]
    everywhere = _size(model) - sum(sizes) - before - behind
    starts = _starts([before + sizes[0], *sizes[1:-1], sizes[-1] + behind] if len(sizes) > 1 else sizes, stages)
    parts = [sum(sizes[start:end]) for start, end in itertools.pairwise([*starts, len(sizes)])]
    parts[0] += before
    parts[-1] += behind
    return Cut(name, starts, len(sizes), everywhere + max(parts))


def _starts(sizes: Sequence[int], stages: int) -> tuple[int, ...]:
    """First layers of stages of about equal size, none of them without a layer: where equal shares would begin."""
    total = sum(sizes) or 1
    middles = [end - size / 2 for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    starts = [0]
    for number in range(1, stages):
        wanted = sum(middle < total * number / stages for middle in middles)
        starts.append(min(max(wanted, starts[-1] + 1), len(sizes) - stages + number))
    return tuple(starts)


def _size(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters; a module that occurs twice counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _units(model: nn.Module, name: str) -> tuple[list[_Unit], list[_Unit]]:
    """Modules that stand before and behind the list of layers, in the order in which they were made."""
    before: list[_Unit] = []
    behind: list[_Unit] = []
    parent = model
    for step in filter(None, name.split(".")):
        side = before
        for child_name, child in parent._modules.items():
            if child_name == step:
                side = behind
            elif child is not None:
                side.append((parent, child_name, child))
        parent = parent.get_submodule(step)
    return before, behind


def _embeddings_before(model: nn.Module, name: str) -> Iterator[_Unit]:
    for parent, child_name, unit in _units(model, name)[0]:
        if isinstance(unit, nn.Embedding):
            yield parent, child_name, unit
            continue
        for module in unit.modules():
            for inner_name, inner in module.named_children():
                if isinstance(inner, nn.Embedding):
                    yield module, inner_name, inner


def _replace_embeddings(model: nn.Module, name: str, device: torch.device) -> None:
    for parent, child_name, embedding in list(_embeddings_before(model, name)):
        weight = embedding.weight
        shell = copy.copy(embedding)
        shell._parameters = {}
        # One number that looks like a matrix. No parameter, so that moving the model does not write it out.
        shell.weight = torch.full((), torch.nan, dtype=weight.dtype, device=device).expand(weight.shape)
        parent._modules[child_name] = shell


def _drop_what_follows(model: nn.Module, name: str) -> None:
    for parent, child_name, unit in _units(model, name)[1]:
        if _size(unit):
            parent._modules[child_name] = _shell(unit, _not_here(child_name))


def _shell(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Returns a module's stand-in: its attributes without parameters and submodules, and another `forward`."""
    shell = copy.copy(module)
    shell._modules, shell._parameters, shell._buffers = {}, {}, {}
    shell.forward = forward
    return shell


def _not_here(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{name} is on the last stage of the pipeline, but the model uses it before its layers: such a model "
            "cannot be cut into stages"
        )

    return forward


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    raise _LeftStage(output)
