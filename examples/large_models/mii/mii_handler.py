"""A model of DeepSpeed-MII: its pipeline does batching, kernels and tensor parallelism by itself."""

from __future__ import annotations

import json
from abc import ABC
from typing import Any

import mii

from ts.torch_handler.distributed.base_deepspeed_handler import BaseDeepSpeedHandler
from ts.utils.util import PredictionException


class ModelHandler(BaseDeepSpeedHandler, ABC):
    """`handle` is called on every rank with the same rows; rank 0 answers."""

    def initialize(self, ctx: Any) -> None:
        super().initialize(ctx)
        options = ctx.model_yaml_config.get("handler", {})
        self.new_tokens = options.get("max_new_tokens", 50)
        # Every rank returns the texts: the handlers of a group have to agree about each batch.
        self.model = mii.pipeline(ctx.system_properties["model_dir"], all_rank_output=True)
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        prompts = [self._prompt(row.get("body", row.get("data"))) for row in data]
        return [response.generated_text for response in self.model(prompts, max_new_tokens=self.new_tokens)]

    @staticmethod
    def _prompt(body: Any) -> str:
        """The prompt of a request; raises PredictionException, which answers 400, where there is none."""
        if isinstance(body, bytes | bytearray | str):
            try:
                body = json.loads(body)
            except ValueError:
                raise PredictionException("The body is not JSON.", 400) from None
        prompt = body.get("prompt") if isinstance(body, dict) else None
        if isinstance(prompt, str) and prompt:
            return prompt
        raise PredictionException('Send {"prompt": "some text"}.', 400)
