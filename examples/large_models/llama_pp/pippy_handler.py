"""A causal language model of transformers in stages, one per process: pipeline parallelism."""

from __future__ import annotations

from abc import ABC
from typing import Any

from text_generation import answer
from transformers import AutoModelForCausalLM

from ts.handler_utils.distributed.pt_pippy import get_pipeline_driver
from ts.torch_handler.distributed.base_pippy_handler import BasePippyHandler


class ModelHandler(BasePippyHandler, ABC):
    """Only rank 0's `handle` is called; the driver has the other ranks run their stages."""

    def initialize(self, ctx: Any) -> None:
        super().initialize(ctx)
        model = AutoModelForCausalLM.from_pretrained(ctx.system_properties["model_dir"], local_files_only=True)
        self.model = get_pipeline_driver(model, self.world_size, ctx)
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        return answer(self.model, data, context, self.device)
