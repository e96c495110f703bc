"""A causal language model that accelerate spreads over what there is: GPUs first, then memory, then disk."""

from __future__ import annotations

import json
from abc import ABC
from pathlib import Path
from typing import Any

from text_generation import answer
from transformers import AutoModelForCausalLM

from ts.torch_handler.base_handler import BaseHandler


class ModelHandler(BaseHandler, ABC):
    """One process that has all the GPUs: no torchrun."""

    def initialize(self, ctx: Any) -> None:
        folder = ctx.system_properties["model_dir"]
        setup = json.loads(Path(folder, "setup_config.json").read_text(encoding="utf-8"))
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            low_cpu_mem_usage=setup["low_cpu_mem_usage"],
            device_map=setup["device_map"],
            offload_folder=setup.get("offload_folder"),
        ).eval()
        # Where the first layer is; accelerate takes the tensors on from there.
        self.device = self.model.get_input_embeddings().weight.device
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        return answer(self.model, data, context, self.device)
