"""A causal language model shared out among GPUs by DeepSpeed-Inference."""

from __future__ import annotations

from abc import ABC
from typing import Any

from text_generation import answer
from transformers import AutoModelForCausalLM

from ts.handler_utils.distributed.deepspeed import get_ds_engine
from ts.torch_handler.distributed.base_deepspeed_handler import BaseDeepSpeedHandler


class ModelHandler(BaseDeepSpeedHandler, ABC):
    """`handle` is called on every rank with the same rows; rank 0 answers."""

    def initialize(self, ctx: Any) -> None:
        super().initialize(ctx)
        model = AutoModelForCausalLM.from_pretrained(ctx.system_properties["model_dir"], local_files_only=True)
        self.model = get_ds_engine(model, ctx).module
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        return answer(self.model, data, context, self.device)
