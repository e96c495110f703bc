"""Large language models run by TensorRT-LLM, through its LLM interface.

Needs `asyncCommunication: true`, so that the engine gets requests while others run.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from wsgi_ts.handlers.bundled.base import BaseHandler
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.inputs import content_of
from wsgi_ts.handlers.serving.results import send_intermediate_predict_response
from wsgi_ts.handlers.toolkit.library_names import TRT_CACHE, TRT_LLM, TRT_SAMPLING
from wsgi_ts.handlers.toolkit.utils import path_in_archive


class TRTLLMHandler(BaseHandler):
    """Answers `{"prompt": …, "streaming": …, …}` with the generated text; the other fields are sampling parameters.

    The section `handler` of the model's YAML has `engine_dir` (a folder of the archive with an engine or a checkpoint,
    or a name on the Hugging Face hub), `tokenizer_dir` (unset: the engine's), `kv_cache_config`, the fields of
    `tensorrt_llm.llmapi.KvCacheConfig`, and `trt_llm_engine_config`, further arguments of `tensorrt_llm.LLM`.
    """

    engine: Any = None

    def initialize(self, context: Context) -> None:
        """Starts the engine.

        Raises:
            ImportError: tensorrt_llm is not installed.
            ValueError: the model's YAML names no engine.
        """
        self._take_context(context)
        self.engine = self.make_engine(context)
        self.initialized = True

    def make_engine(self, context: Context) -> Any:
        """Makes a `tensorrt_llm.LLM` as the model's YAML says; raises what `initialize` raises."""
        engine = TRT_LLM.load("The handler trt_llm_handler")
        section = context.model_yaml_config.get("handler") or {}
        named = section.get("engine_dir")
        if not named:
            raise ValueError("model-config.yaml names no engine: add handler.engine_dir")
        model_dir = context.system_properties["model_dir"]
        arguments = dict(section.get("trt_llm_engine_config") or {})
        if section.get("tokenizer_dir"):
            arguments["tokenizer"] = path_in_archive(model_dir, section["tokenizer_dir"])
        if section.get("kv_cache_config"):
            settings = TRT_CACHE.load("The handler trt_llm_handler")
            arguments["kv_cache_config"] = settings(**section["kv_cache_config"])
        return engine(model=path_in_archive(model_dir, named), **arguments)

    async def handle(self, data: Any, context: Context) -> list[Any]:
        """Answers one request, which has several rows (B) only behind an envelope; they are generated side by side.

        Returns:
            List of B texts, or of one "" behind a stream whose parts were sent meanwhile, each `{"text": …}`.

        Raises:
            PredictionException: 400, a row is not such JSON, has a sampling parameter that does not exist, or is to be
                streamed beside others.
        """
        started_at = time.perf_counter()
        requests = [_fields(row) for row in data]
        if len(requests) > 1 and any(request.get("streaming") for request in requests):
            raise PredictionException("Send one instance or input at a time where it is to be streamed", 400)
        tasks = [asyncio.ensure_future(self._answer(request, context)) for request in requests]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._record_handler_time(context, started_at)
        return results

    async def _answer(self, request: dict[str, Any], context: Context) -> str:
        streaming = bool(request.pop("streaming", False))
        prompt = request.pop("prompt", None)
        if not isinstance(prompt, str):
            raise PredictionException('The request needs a field "prompt" with a text', 400)
        return await self._generate(prompt, self._sampling(request), streaming, context)

    def _sampling(self, parameters: dict[str, Any]) -> Any:
        parameters_of = TRT_SAMPLING.load("The handler trt_llm_handler")
        try:
            return parameters_of(**parameters)
        except (TypeError, ValueError) as error:
            raise PredictionException(f"Wrong sampling parameters: {error}", 400) from error

    async def _generate(self, prompt: str, sampling: Any, streaming: bool, context: Context) -> str:
        """Returns the text; of a stream, nothing is left to answer with."""
        generation = self.engine.generate_async(prompt, sampling_params=sampling, streaming=streaming)
        sent, text, has_ended = 0, "", False
        try:
            async for output in generation:
                text = output.outputs[0].text
                if streaming and len(text) > sent:
                    chunk = json.dumps({"text": text[sent:]})
                    sent = len(text)
                    room = send_intermediate_predict_response([chunk], context.request_ids, "", 200, context)
                    if room is not None:
                        await room
            has_ended = True
        finally:
            if not has_ended:
                generation.abort()
        return "" if streaming else text


def _fields(row: Any) -> dict[str, Any]:
    """Returns the request's JSON object, which the server may have decoded."""
    # As an envelope hands it over, or the server.
    body = row if isinstance(row, Mapping) and "prompt" in row else content_of(row)
    if isinstance(body, (bytes, bytearray, memoryview, str)):
        try:
            body = json.loads(bytes(body) if isinstance(body, memoryview) else body)
        except ValueError as error:
            raise PredictionException(f"The body is not JSON: {error}", 400) from error
    if not isinstance(body, dict):
        raise PredictionException("The body should be a JSON object", 400)
    return dict(body)
