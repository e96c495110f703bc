"""The handler of the MiniLM example: sentences come in, their embeddings go out.

    {"input": "a sentence"}            ->  [0.012, ...]                   384 numbers of length 1
    {"input": ["one", "another"]}      ->  [[0.012, ...], [0.034, ...]]

Written as one writes a handler for a Hugging Face model: the tokenizer, the configuration and the weights lie side by
side in the archive (--extra-files FOLDER/), and `from_pretrained` reads them from the model directory.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from ts.torch_handler.base_handler import BaseHandler


class SentenceEmbedder(BaseHandler):
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
        options = context.model_yaml_config.get("handler", {})
        self.max_length = int(options.get("max_length", 256))
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answers each request of the batch; one that cannot be read gets a 400 and disturbs no other."""
        questions = self.preprocess(data)
        vectors = self.inference([sentence for question in questions for sentence in self._sentences(question)])
        return self.postprocess(questions, vectors, context)

    def preprocess(self, data: list[dict[str, Any]]) -> list[str | list[str] | ValueError]:
        """What each request asks: a sentence, several sentences, or what is wrong with it."""
        questions: list[str | list[str] | ValueError] = []
        for row in data:
            try:
                questions.append(self._read(row))
            except ValueError as error:
                questions.append(error)
        return questions

    def inference(self, sentences: list[str]) -> torch.Tensor:
        """Unit vectors (n, 384) of n sentences: the mean over each sentence's tokens."""
        if not sentences:
            return torch.empty(0, self.model.config.hidden_size)
        tokens = self.tokenizer(
            sentences, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            states = self.model(**tokens).last_hidden_state
        present = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        means = (states * present).sum(dim=1) / present.sum(dim=1)
        return torch.nn.functional.normalize(means, dim=1).cpu()

    def postprocess(
        self, questions: list[str | list[str] | ValueError], vectors: torch.Tensor, context: Any
    ) -> list[Any]:
        """Gives each request its own vectors: a flat list where it sent one string, else a list of lists."""
        answers: list[Any] = []
        start = 0
        for place, question in enumerate(questions):
            found = vectors[start : start + len(self._sentences(question))].tolist()
            start += len(found)
            if isinstance(question, ValueError):
                context.set_response_status(400, "Bad Request", place)
                answers.append({"error": str(question)})
            else:
                answers.append(found[0] if isinstance(question, str) else found)
        return answers

    @staticmethod
    def _sentences(question: str | list[str] | ValueError) -> list[str]:
        if isinstance(question, ValueError):
            return []
        return [question] if isinstance(question, str) else question

    @staticmethod
    def _read(row: dict[str, Any]) -> str | list[str]:
        body = row.get("body", row.get("data"))
        if isinstance(body, (bytes, bytearray)):
            # Sent without a content type, as `curl -T` does: the server hands over the bytes as they came.
            try:
                body = json.loads(body.decode("utf-8"))
            except ValueError:
                raise ValueError("The body is not JSON.") from None
        given = body.get("input") if isinstance(body, dict) else None
        if given and isinstance(given, str):
            return given
        if given and isinstance(given, list) and all(isinstance(each, str) for each in given):
            return given
        raise ValueError('Send {"input": "a sentence"} or {"input": ["one", "another"]}.')
