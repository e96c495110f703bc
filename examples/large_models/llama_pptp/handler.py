"""A Llama in stages, each of them shared out among processes: pipeline and tensor parallelism together."""

from __future__ import annotations

from abc import ABC
from typing import Any

from text_generation import answer
from transformers import AutoModelForCausalLM

from ts.handler_utils.distributed.pt_pippy import get_pipeline_driver
from ts.torch_handler.distributed.base_tensor_parallel_handler import BaseTensorParallelHandler


class ModelHandler(BaseTensorParallelHandler, ABC):
    """`handle` is called on every rank with the same rows; rank 0 answers."""

    def initialize(self, ctx: Any) -> None:
        super().initialize(ctx)
        model = AutoModelForCausalLM.from_pretrained(ctx.system_properties["model_dir"], local_files_only=True)
        self.model = get_pipeline_driver(model, self.world_size, ctx)
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        return answer(self.model, data, context, self.device)
