"""Models served by DeepSpeed-Inference, which shares them out among the ranks itself."""

from __future__ import annotations

import os
from typing import Any

import torch

from wsgi_ts.handlers.distributed.ranks import DistributedHandler, rank_device, section
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.toolkit.library_names import (
    COMPATIBLE_OPERATORS,
    DEEPSPEED_INFERENCE,
    DEEPSPEED_JOIN,
    DEEPSPEED_SHARED_MEMORY,
    LibraryName,
)


class BaseDeepSpeedHandler(DistributedHandler):
    """The handler to derive from for DeepSpeed, under `parallelType: tp`. `handle` is called on every rank."""

    def initialize(self, context: Context) -> None:
        """Chooses the device and lets DeepSpeed connect the ranks. Loading the model is up to the derived class.

        Raises:
            ImportError: deepspeed is not installed.
        """
        self._take_context(context)
        self.device = rank_device(self.local_rank, context)
        _deepspeed(self.device, DEEPSPEED_JOIN)("nccl" if self.device.type == "cuda" else "gloo")


def get_ds_engine(model: Any, context: Context) -> Any:
    """Hands a model, with the same weights in all processes, to DeepSpeed as the `deepspeed` section of the YAML says.

    Ranks that `initialize` of the base class has not connected are connected here.

    Returns:
        DeepSpeed's engine; the model to call is its `module`.

    Raises:
        ImportError: deepspeed is not installed.
        ValueError: there is no model, or the section, or one of the files that it names, is missing.
    """
    if model is None:
        raise ValueError("get_ds_engine was given None instead of a model: load the model into what you hand over")
    options = section(context, "deepspeed")
    if "config" not in options:
        raise ValueError(
            "model-config.yaml: deepspeed.config is missing: name the archive's DeepSpeed config file there"
        )
    folder = context.system_properties["model_dir"]
    config = _file(folder, "config", options["config"])
    checkpoint = _file(folder, "checkpoint", options["checkpoint"]) if options.get("checkpoint") else None
    device = rank_device(int(os.environ.get("LOCAL_RANK", "0")), context)
    return _deepspeed(device, DEEPSPEED_INFERENCE)(model=model, config=config, checkpoint=checkpoint)


def _file(folder: str, key: str, name: Any) -> str:
    path = os.path.join(folder, str(name))
    if not os.path.isfile(path):
        raise ValueError(
            f"model-config.yaml: deepspeed.{key} names {name}, which is not in the archive: add it with --extra-files"
        )
    return path


def _deepspeed(device: torch.device, name: LibraryName) -> Any:
    """Returns a function of DeepSpeed, for this kind of device."""
    if device.type == "cuda":
        return name.load("A DeepSpeed handler")
    # Read at its import. Without it a GPU is used that deviceType forbids.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    operators = COMPATIBLE_OPERATORS.load("A DeepSpeed handler")
    # Its own way to add up, in shared memory, is compiled while the model loads, crashes under any launcher but its own
    # (which sets LOCAL_SIZE), and leaves 66 MiB per rank in /dev/shm for good. Without it torch.distributed adds up.
    operators[DEEPSPEED_SHARED_MEMORY] = False
    return name.load("A DeepSpeed handler")
