"""The bundled text handlers: the base with its helpers, and the classifier of bags of n-grams."""

from __future__ import annotations

import os
import string
import unicodedata
from abc import ABC
from typing import Any, NamedTuple

import torch

from wsgi_ts.handlers.bundled.base import BaseHandler
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.inputs import content_of
from wsgi_ts.handlers.toolkit.library_names import INTEGRATED_GRADIENTS, load_for_explanation
from wsgi_ts.handlers.toolkit.text_utils import (
    Tokenizer,
    Vocabulary,
    expand_contractions,
    get_tokenizer,
    load_vocabulary,
    ngrams_iterator,
)
from wsgi_ts.handlers.toolkit.utils import CLEANUP_REGEX, map_class_to_label

#: Where the vocabulary is looked for in the model's folder, unless the manifest's `sourceVocab` names a file.
VOCABULARY_FILES = ("source_vocab.pt", "source_vocab.json", "source_vocab.txt")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_INTEGRATION_STEPS = 50


class TextHandler(BaseHandler, ABC):
    """Base of handlers for text with a vocabulary of their own.

    Attributes:
        source_vocab: token -> index, from the archive's vocabulary file.
        tokenizer: cuts a text into tokens; `basic_english` unless a derived class sets another.
    """

    source_vocab: Vocabulary = Vocabulary()
    tokenizer: Tokenizer = staticmethod(get_tokenizer("basic_english"))

    def initialize(self, context: Context) -> None:
        """Loads the model and the vocabulary.

        Raises:
            FileNotFoundError: the archive has no vocabulary.
            ValueError: the vocabulary cannot be read.
        """
        super().initialize(context)
        self.source_vocab = load_vocabulary(self.get_source_vocab_path(context), weights_only=self._weights_only)

    def get_source_vocab_path(self, ctx: Context) -> str:
        """Returns the path of the vocabulary file.

        Raises:
            FileNotFoundError: there is none.
        """
        named = ((ctx.manifest or {}).get("model") or {}).get("sourceVocab")
        names = (os.path.basename(named),) if named else VOCABULARY_FILES
        for name in names:
            path: str = os.path.join(ctx.system_properties["model_dir"], name)
            if os.path.isfile(path):
                return path
        raise FileNotFoundError(
            f"{type(self).__name__} needs a vocabulary: put {' or '.join(names)} into the archive with --extra-files."
        )

    def get_word_token(self, input_tokens: Any, tokenizer: Any = None) -> list[str]:
        """Returns the tokens of one text without the mark that byte-pair tokenizers put before a word.

        Args:
            input_tokens: the tokens; with a tokenizer their ids.
            tokenizer: has `convert_ids_to_tokens`, as those of transformers have.
        """
        tokens = input_tokens if tokenizer is None else tokenizer.convert_ids_to_tokens(input_tokens)
        return [token.lstrip("\u0120") for token in tokens]

    def summarize_attributions(self, attributions: torch.Tensor) -> torch.Tensor:
        """Returns one number per token, (tokens,), from attributions (1, tokens, dimensions), scaled to a norm of 1."""
        summed = attributions.sum(dim=-1).squeeze(0)
        norm = torch.linalg.vector_norm(summed)
        return summed / norm if norm > 0 else summed

    def _remove_html_tags(self, text: str) -> str:
        return CLEANUP_REGEX.sub("", text)

    def _expand_contractions(self, text: str) -> str:
        return expand_contractions(text)

    def _remove_accented_characters(self, text: str) -> str:
        return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")

    def _remove_punctuation(self, text: str) -> str:
        return text.translate(_WITHOUT_PUNCTUATION)

    def _remove_puncutation(self, text: str) -> str:
        """The spelling of older releases; derived handlers call it."""
        return self._remove_punctuation(text)

    def _tokenize(self, text: str) -> list[str]:
        return self.tokenizer(text)


class TextBatch(NamedTuple):
    """The input of a bag model.

    Attributes:
        indices: int64 tensor (N,), the vocabulary's indices of all rows, one after the other.
        tokens: the N n-grams that these stand for, a list per row.
        offsets: int64 tensor (B,), where each row begins in `indices`.
    """

    indices: torch.Tensor
    tokens: list[list[str]]
    offsets: torch.Tensor


class TextClassifier(TextHandler):
    """Answers each text with all classes and their probabilities; for models called as `model(text, offsets)`."""

    ngrams = 2

    def preprocess(self, data: list[dict[str, Any]]) -> TextBatch:
        """Cleans each text, cuts it into words and pairs of words, and looks these up.

        Args:
            data: list of B rows with a text in `data` or `body`, as str or UTF-8.

        Returns:
            The n-grams of all B texts, one after the other.

        Raises:
            PredictionException: 400, a row has no text.
        """
        tokens = [list(ngrams_iterator(self._words(row), self.ngrams)) for row in data]
        indices = [self.source_vocab[token] for row in tokens for token in row]
        offsets = [0]
        for row in tokens[:-1]:
            offsets.append(offsets[-1] + len(row))
        return TextBatch(
            torch.tensor(indices, dtype=torch.long, device=self.device),
            tokens,
            torch.tensor(offsets, dtype=torch.long, device=self.device),
        )

    def _words(self, row: Any) -> list[str]:
        text = content_of(row)
        if isinstance(text, (bytes, bytearray)):
            text = text.decode("utf-8", "replace")
        if not isinstance(text, str):
            raise PredictionException(
                "Send the text as the body, or in the form field data; one in each instance or input.", 400
            )
        text = self._expand_contractions(self._remove_html_tags(text).lower())
        return self._tokenize(self._remove_punctuation(self._remove_accented_characters(text)))

    def inference(self, data: TextBatch, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on the bags of B texts; returns scores (B, classes)."""
        return super().inference(data.indices, data.offsets, *args, **kwargs)

    def postprocess(self, data: torch.Tensor) -> list[dict[str, float]]:
        """Turns scores (B, classes) into B dicts label -> probability, of all classes."""
        return map_class_to_label(torch.nn.functional.softmax(data, dim=1).tolist(), self.mapping)

    def get_insights(self, text_preprocess: TextBatch, _: Any, target: Any = 0) -> list[dict[str, Any]]:
        """Returns how much each n-gram speaks for the class `target`: integrated gradients over the model's embedding.

        Args:
            text_preprocess: what `preprocess` returned.
            target: the class to explain, or a list of B classes.

        Returns:
            B dicts: the n-grams of a text (`words`) and as many `importances`, scaled to a norm of 1.

        Raises:
            PredictionException: 501, captum is missing or the model is not an eager one with an EmbeddingBag.
        """
        integrated_gradients = load_for_explanation(INTEGRATED_GRADIENTS)
        bag = self._embedding_bag()
        ends = [*text_preprocess.offsets.tolist()[1:], len(text_preprocess.indices)]
        targets = target if isinstance(target, list) else [target] * len(ends)
        insights = []
        start = 0
        for tokens, end, wanted in zip(text_preprocess.tokens, ends, targets, strict=True):
            indices, start = text_preprocess.indices[start:end], end
            vectors = bag.weight.detach()[indices].unsqueeze(0)
            gradients = integrated_gradients(lambda given: self._from_vectors(bag, given))
            importances = gradients.attribute(vectors, target=wanted, n_steps=_INTEGRATION_STEPS)
            insights.append({"importances": self.summarize_attributions(importances).tolist(), "words": tokens})
        return insights

    def _embedding_bag(self) -> Any:
        if isinstance(self.model, torch.nn.Module) and not isinstance(self.model, torch.jit.ScriptModule):
            for module in self.model.modules():
                if isinstance(module, torch.nn.EmbeddingBag) and module.mode != "max":
                    return module
        raise PredictionException(
            "Explanations need an eager model (--model-file) with a torch.nn.EmbeddingBag of mode mean or sum.", 501
        )

    def _from_vectors(self, bag: torch.nn.EmbeddingBag, vectors: torch.Tensor) -> Any:
        """Returns the model's output where the bag's words have these vectors: [texts, words, dimensions]."""
        pooled = vectors.sum(dim=1) if bag.mode == "sum" else vectors.mean(dim=1)
        hook = bag.register_forward_hook(lambda module, given, output: pooled)
        try:
            nothing = torch.zeros(len(vectors), dtype=torch.long, device=self.device)
            return self.model(nothing, torch.arange(len(vectors), device=self.device))
        finally:
            hook.remove()
