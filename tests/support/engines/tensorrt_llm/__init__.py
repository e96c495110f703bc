"""Stand-in for TensorRT-LLM's LLM interface: what the bundled `trt_llm` handler uses of it, under the same names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from letters import LetterModel, continue_text
from tensorrt_llm.llmapi import KvCacheConfig


@dataclass
class SamplingParams:
    """How text is generated."""

    max_tokens: int = 16
    temperature: float = 1.0


class LLM:
    """The engine."""

    def __init__(
        self, model: str, tokenizer: Any = None, kv_cache_config: KvCacheConfig | None = None, max_batch_size: int = 4
    ) -> None:
        assert kv_cache_config is not None
        print(f"engine {model} {tokenizer} {kv_cache_config.free_gpu_memory_fraction}", flush=True)
        self.model = LetterModel().eval()

    def generate_async(self, prompt: str, sampling_params: SamplingParams, streaming: bool) -> Generation:
        """Begins to generate."""
        return Generation(self.model, prompt, sampling_params.max_tokens, streaming)


class Generation:
    """The whole text so far after each token of a stream, else once."""

    def __init__(self, model: LetterModel, prompt: str, max_tokens: int, streaming: bool) -> None:
        self._letters = continue_text(model, prompt, max_tokens)
        self._streaming = streaming

    async def __aiter__(self) -> AsyncIterator[Any]:
        text = ""
        async for letter in self._letters:
            text += letter
            if self._streaming:
                yield SimpleNamespace(outputs=[SimpleNamespace(text=text)])
        if not self._streaming:
            yield SimpleNamespace(outputs=[SimpleNamespace(text=text)])

    def abort(self) -> None:
        """Ends it."""
        print("generation aborted", flush=True)
