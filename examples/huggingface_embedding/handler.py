"""The handler of the bge-large-zh example: sentences come in, their embeddings go out.

    {"input": "a sentence"}            ->  [[0.012, ...]]
    {"input": ["one", "another"]}      ->  [[0.012, ...], [0.034, ...]]

The base class's `handle` calls the three phases one after another; what they share of a batch is passed along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import PredictionException


class EmbeddingHandler(BaseHandler):
    """Embeds all sentences of all requests of a batch in one run of the model."""

    def initialize(self, context: Any) -> None:
        """Loads tokenizer and model from the archive's folder; nothing is fetched."""
        properties = context.system_properties
        folder = properties["model_dir"]
        gpu_id = properties.get("gpu_id")
        usable = torch.cuda.is_available() and gpu_id is not None
        self.device = torch.device(f"cuda:{gpu_id}" if usable else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).to(self.device).eval()
        pooling = json.loads(Path(folder, "1_Pooling", "config.json").read_text())
        self.pool_first_token = pooling["pooling_mode_cls_token"]
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> list[list[str]]:
        """The sentences of each request."""
        return [self._sentences(row) for row in data]

    def inference(self, requests: list[list[str]]) -> list[torch.Tensor]:
        """Unit vectors (n, size) for each request's n sentences."""
        sentences = [sentence for request in requests for sentence in request]
        tokens = self.tokenizer(sentences, padding=True, truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            vectors = self._pool(self.model(**tokens.to(self.device)), tokens["attention_mask"])
        vectors = torch.nn.functional.normalize(vectors, dim=1).cpu()
        return list(vectors.split([len(request) for request in requests]))

    def postprocess(self, vectors: list[torch.Tensor]) -> list[list[list[float]]]:
        """Gives each request its own vectors."""
        return [own.tolist() for own in vectors]

    def _pool(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """One vector per sentence: that of its first token, or the mean over its tokens."""
        states: torch.Tensor = output.last_hidden_state
        if self.pool_first_token:
            return states[:, 0]
        present = mask.unsqueeze(-1).to(states)
        return (states * present).sum(dim=1) / present.sum(dim=1)

    @staticmethod
    def _sentences(row: dict[str, Any]) -> list[str]:
        """Raises PredictionException, which answers the batch with a 400, for what is no sentence."""
        body = row.get("body", row.get("data"))
        if isinstance(body, (bytes, bytearray, str)):
            # `curl -T` sends no content type: the server hands over the bytes as they came.
            try:
                body = json.loads(body)
            except ValueError:
                raise PredictionException("The body is not JSON.", 400) from None
        given = body.get("input") if isinstance(body, dict) else None
        sentences = [given] if isinstance(given, str) else given
        if isinstance(sentences, list) and sentences and all(isinstance(each, str) for each in sentences):
            return sentences
        raise PredictionException('Send {"input": "a sentence"} or {"input": ["one", "another"]}.', 400)
