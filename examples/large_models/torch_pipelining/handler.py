"""A text classifier on torch.distributed.pipelining: its stages and its schedule, with buffers of one shape."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from classifier import CLASSES, PAD, SIZE, Classifier
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from ts.torch_handler.distributed.base_tensor_parallel_handler import BaseTensorParallelHandler
from ts.utils.util import PredictionException


class ModelHandler(BaseTensorParallelHandler, ABC):
    """`handle` is called on every rank with the same rows: each runs its stage, and rank 0 answers."""

    def initialize(self, ctx: Any) -> None:
        super().initialize(ctx)
        options = ctx.model_yaml_config["handler"]
        self.rows, self.length = ctx.model_yaml_config["batchSize"], options["max_length"]
        chunks = options["chunks"]
        if self.rows % chunks:
            raise ValueError(
                f"model-config.yaml: handler.chunks is {chunks}, which does not divide batchSize {self.rows}"
            )
        model = self._stage(Path(ctx.system_properties["model_dir"], "classifier.pt"))
        # Told all shapes, the stages need not tell each other.
        micro = self.rows // chunks
        ids = torch.empty(micro, self.length, dtype=torch.long, device="meta")
        states = torch.empty(micro, self.length, SIZE, device="meta")
        scores = torch.empty(micro, CLASSES, device="meta")
        self.is_last = self.rank == self.world_size - 1
        stage = PipelineStage(
            model,
            self.rank,
            self.world_size,
            self.device,
            input_args=(states if self.rank else ids,),
            output_args=(scores if self.is_last else states,),
        )
        self.schedule = ScheduleGPipe(stage, chunks)
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        ids = torch.full((self.rows, self.length), PAD)  # always full batches: the rows that are missing are padding
        for row, target in zip(data, ids, strict=False):
            text = torch.tensor(list(_text(row))[: self.length])
            target[: len(text)] = text
        scores = torch.empty(self.rows, CLASSES, device=self.device)
        with torch.no_grad():
            output = self.schedule.step(*(() if self.rank else (ids.to(self.device),)))
        if self.is_last:
            scores.copy_(output)
        dist.broadcast(scores, self.world_size - 1)
        return [{"class": int(row.argmax()), "scores": row.tolist()} for row in scores[: len(data)].cpu()]

    def _stage(self, weights: Path) -> torch.nn.Module:
        """This rank's part of the model: about as many layers as the others have."""
        model = Classifier()
        model.load_state_dict(torch.load(weights, weights_only=True))
        start, end = (len(model.layers) * number // self.world_size for number in (self.rank, self.rank + 1))
        model.layers = model.layers[start:end]
        if self.rank:
            model.embed = None
        if self.rank < self.world_size - 1:
            model.head = None
        return model.to(self.device).eval()


def _text(row: dict[str, Any]) -> bytes:
    """The text of a request; raises PredictionException, which answers 400, where there is none."""
    body = row.get("body", row.get("data"))
    if not isinstance(body, bytes | bytearray | str) or not body:
        raise PredictionException("Send a text.", 400)
    return body.encode() if isinstance(body, str) else bytes(body)
