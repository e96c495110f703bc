"""Large language models behind OpenAI's interface, run by vLLM.

vLLM builds its own HTTP application over its engine; the handler passes each request to that application in this
process, as an HTTP server would, and its answer on to the client: what is validated, how text is streamed and what an
error looks like is vLLM's. Needs `asyncCommunication: true`, so that the engine gets requests while others run.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from wsgi_ts.handlers.bundled.base import BaseHandler
from wsgi_ts.handlers.serving.context import Context, StreamClosed
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.inputs import content_of
from wsgi_ts.handlers.serving.results import send_intermediate_predict_response
from wsgi_ts.handlers.toolkit.kv_cache import report_kv_cache_usage
from wsgi_ts.handlers.toolkit.library_names import (
    PROMETHEUS_REGISTRY,
    VLLM_APP_STATE,
    VLLM_ARGUMENTS,
    VLLM_BUILD_APP,
    VLLM_ENGINE,
    VLLM_KV_CACHE_GAUGES,
    VLLM_LORA,
    VLLM_MAKE_PARSER,
    VLLM_PARSER,
    import_extra,
)
from wsgi_ts.handlers.toolkit.utils import path_in_archive

log = logging.getLogger(__name__)

#: Who needs vLLM, for messages.
_HANDLER = "The handler vllm_handler"

Message = MutableMapping[str, Any]
#: An ASGI 3 application: (scope, receive, send).
Application = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

#: Paths behind the model's own, and the method by which vLLM knows them.
ENDPOINTS = {"v1/models": "GET", "v1/completions": "POST", "v1/chat/completions": "POST"}
_EVENT_STREAM = "text/event-stream"
#: How long the application may take to end a request whose client has gone, in seconds; then its task is cancelled.
_FAREWELL_S = 5.0
#: How often the engine's use of its KV cache is read, in seconds: as often as the server looks.
_KV_CACHE_LOOK_S = 0.25


class VLLMHandler(BaseHandler):
    """Answers `v1/models`, `v1/completions` and `v1/chat/completions`.

    The section `handler` of the model's YAML has `model_path`, or `vllm_engine_config.model` (a folder of the archive
    or a name on the Hugging Face hub); `vllm_engine_config`, the engine's arguments by the names of
    `vllm.AsyncEngineArgs`; `adapters`, LoRA folders by name; and `chat_template`, a file or the template itself.
    """

    application: Application | None = None

    async def initialize(self, context: Context) -> None:  # type: ignore[override]  # the service awaits it
        """Starts the engine. A derived class awaits it: `await super().initialize(context)`.

        Raises:
            ImportError: vllm is not installed, or has other entry points than this handler knows.
            ValueError: the section `handler` is wrong.
        """
        self._take_context(context)
        self.application = await self.make_application(context)
        self.initialized = True

    async def make_application(self, context: Context) -> Application:
        """Returns the ASGI application that answers. Override it to serve the same paths with another engine."""
        return await vllm_application(context)

    async def handle(self, data: Any, context: Context) -> list[Any]:
        """Answers one request: `preprocess`, `inference` through vLLM's application, and `postprocess`.

        Args:
            data: list of one row, OpenAI's JSON in `data` or `body`, decoded or not; without effect for `v1/models`.
            context: has the request's header `url_path`, and gets status and content type of vLLM's answer.

        Returns:
            List of one body as vLLM made it, b"" behind an event stream whose parts were sent meanwhile.

        Raises:
            PredictionException: 404 for another path, 400 for several instances or inputs of an envelope.
            RuntimeError: a derived class has not awaited `initialize`.
        """
        started_at = time.perf_counter()
        inputs = await self.preprocess(data, context)
        outputs = await self.postprocess(await self.inference(inputs, context))
        self._record_handler_time(context, started_at)
        return outputs

    async def preprocess(  # type: ignore[override]  # `handle` awaits it
        self, requests: list[Any], context: Context
    ) -> list[Any]:
        """Returns the request's JSON as text, alone in a list. A derived class may change it, or return a dictionary.

        Raises:
            PredictionException: 400 for several instances or inputs of an envelope.
        """
        if len(requests) > 1:
            raise PredictionException("Send one instance or input at a time: each is a request by itself", 400)
        body = content_of(requests[0])
        if body is None:
            body = requests[0]  # an instance as an envelope hands it over
        if isinstance(body, (bytes, bytearray, memoryview)):
            return [bytes(body).decode(errors="surrogateescape")]
        return [body]

    async def inference(self, input_batch: list[Any], context: Context) -> list[Any]:
        """Runs the request through the application; what `handle` returns.

        Raises:
            PredictionException: 404 for another path.
            RuntimeError: a derived class has not awaited `initialize`.
        """
        if self.application is None:
            raise RuntimeError("The engine was not started: `initialize` must be `await super().initialize(context)`.")
        path = str(context.get_request_header(0, "url_path") or "")
        method = ENDPOINTS.get(path)
        if method is None:
            raise PredictionException(f"Unknown API endpoint: {path}", 404)
        exchange = _Exchange(context, method, f"/{path}", b"" if method == "GET" else _encoded(input_batch[0]))
        return [await exchange.run(self.application)]

    async def postprocess(self, inference_outputs: list[Any]) -> list[Any]:
        """Returns the answer as it is. A derived class may change one that is no event stream."""
        return inference_outputs


def _encoded(body: Any) -> bytes:
    """The JSON of a request, which the server, an envelope or a derived class may have decoded."""
    if isinstance(body, (bytes, bytearray)):
        return bytes(body)
    return body.encode(errors="surrogateescape") if isinstance(body, str) else json.dumps(body).encode()


class _Exchange:
    """One request to the application: status and headers go to the context, an event stream chunk by chunk."""

    def __init__(self, context: Context, method: str, path: str, body: bytes) -> None:
        self._context = context
        self._request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._client_gone = asyncio.Event()
        self._chunks: list[bytes] = []
        self._is_stream = False
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        request_id = context.get_request_id(0)
        if request_id:
            headers["x-request-id"] = request_id
        self._scope: MutableMapping[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            "state": {},
        }

    async def run(self, application: Application) -> bytes:
        """Runs the application to its end; returns the body, or the empty last chunk of a stream."""
        task = asyncio.ensure_future(application(self._scope, self._receive, self._send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # The application learns it in its own way, and takes the request out of its engine.
            self._client_gone.set()
            await asyncio.wait([task], timeout=_FAREWELL_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # there is nobody to tell of an error
            raise
        return b"" if self._is_stream else b"".join(self._chunks)

    async def _receive(self) -> Message:
        if self._request:
            return self._request.pop()
        await self._client_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {bytes(name).lower(): bytes(value).decode("latin-1") for name, value in message["headers"]}
            content_type = headers.get(b"content-type", "application/json")
            self._is_stream = content_type.startswith(_EVENT_STREAM)
            self._context.set_response_status(message["status"], "", 0)
            self._context.set_response_content_type(0, content_type)
        elif message["type"] == "http.response.body":
            chunk = bytes(message.get("body", b""))
            if self._is_stream and chunk:
                await self._stream(chunk)
            else:
                self._chunks.append(chunk)

    async def _stream(self, chunk: bytes) -> None:
        """Sends a part of an event stream; that its client has gone, the application learns from `_receive`."""
        try:
            sent = send_intermediate_predict_response([chunk], self._context.request_ids, "", 200, self._context)
        except StreamClosed:
            self._client_gone.set()
        else:
            if sent is not None:
                await sent


async def vllm_application(context: Context) -> Application:
    """Starts vLLM's engine and builds its HTTP application over it.

    Raises:
        ImportError: vllm is not installed, or has other entry points than this function knows.
        ValueError: the section `handler` is wrong.
    """
    vllm = import_extra("vllm", _HANDLER)
    # A fork of this process would have a CUDA context that it cannot use.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    arguments = _serve_arguments(context, vllm.__version__)
    engine_arguments = VLLM_ARGUMENTS.load(_HANDLER).from_cli_args(arguments)
    engine = VLLM_ENGINE.load(_HANDLER).from_engine_args(engine_arguments)
    offered: dict[str, Any] = {
        "args": arguments,
        "engine_client": engine,
        "model_config": engine.model_config,
        "vllm_config": engine.vllm_config,
        "supported_tasks": await engine.get_supported_tasks(),
    }
    application = _call(VLLM_BUILD_APP.load(_HANDLER), offered)
    offered["state"] = application.state
    await _call(VLLM_APP_STATE.load(_HANDLER), offered)
    # vLLM's error handlers ask the server that they believe to run in to exit, once the engine is dead.
    application.state.server = _WorkerAsServer()
    # Kept there since the event loop itself does not keep a task alive.
    application.state.kv_cache_watch = asyncio.ensure_future(_watch_kv_cache(context))
    built: Application = application
    return built


async def _watch_kv_cache(context: Context) -> None:
    """Tells the server of the engine's KV cache, as long as the event loop runs and vLLM can be asked."""
    try:
        while True:
            usage = kv_cache_usage()
            if usage is not None:
                report_kv_cache_usage(context, min(max(usage, 0.0), 1.0))
            await asyncio.sleep(_KV_CACHE_LOOK_S)
    except Exception:  # it costs a metric, not the model
        log.warning(
            "vLLM does not say how full its KV cache is; vllm:kv_cache_usage_perc stays as it is", exc_info=True
        )


def kv_cache_usage() -> float | None:
    """How full vLLM says that the KV cache is, from 0 to 1: the mean of its engines in this process.

    None where it does not say so (`disable_log_stats`).

    Raises:
        ImportError: prometheus_client, which vLLM records its metrics with, has another interface.
    """
    registry = PROMETHEUS_REGISTRY.load(_HANDLER)
    for name in VLLM_KV_CACHE_GAUGES:
        values = [
            sample.value for metric in registry.restricted_registry([name]).collect() for sample in metric.samples
        ]
        if values:
            return float(sum(values) / len(values))
    return None


def _serve_arguments(context: Context, version: str) -> argparse.Namespace:
    """Returns the arguments of `vllm serve` that the model's YAML stands for."""
    make_parser, parser = VLLM_MAKE_PARSER.load(_HANDLER), VLLM_PARSER.load(_HANDLER)
    arguments: argparse.Namespace = make_parser(parser()).parse_args([])
    for name, value in engine_settings(context).items():
        if not hasattr(arguments, name):
            log.warning("handler.vllm_engine_config.%s: vLLM %s does not know it, ignored", name, version)
        setattr(arguments, name, value)
    adapters = adapter_folders(context)
    if adapters:
        lora = VLLM_LORA.load(_HANDLER)
        arguments.lora_modules = [lora(name=name, path=path) for name, path in adapters.items()]
    return arguments


class _WorkerAsServer:
    """Stands for the HTTP server in which vLLM's application believes to run."""

    @property
    def should_exit(self) -> bool:
        """False: while this process lives, it serves."""
        return False

    @should_exit.setter
    def should_exit(self, wanted: bool) -> None:
        if wanted:
            print("vLLM's engine is dead: the worker ends, and another one is started.", file=sys.stderr, flush=True)
            os._exit(1)


def engine_settings(context: Context) -> dict[str, Any]:
    """Returns the engine's arguments that the model's YAML gives; those that are null are left to vLLM.

    Raises:
        ValueError: no model is named, or the section has another form.
    """
    section, model_dir = _section(context.model_yaml_config, "handler"), context.system_properties["model_dir"]
    given = {name: value for name, value in _section(section, "vllm_engine_config").items() if value is not None}
    named = given.get("model") or section.get("model_path")
    if not named:
        raise ValueError("model-config.yaml names no model: add handler.model_path or handler.vllm_engine_config.model")
    given["model"] = path_in_archive(model_dir, str(named))
    # Clients name the model as the YAML does, not by the folder in which its archive happens to lie.
    names = given.get("served_model_name") or str(named)
    given["served_model_name"] = [names] if isinstance(names, str) else list(names)
    template = section.get("chat_template")
    if template:
        # vLLM takes a file or the template itself.
        given["chat_template"] = path_in_archive(model_dir, str(template))
    return given


def adapter_folders(context: Context) -> dict[str, str]:
    """Returns the LoRA adapters that the model's YAML gives: name -> folder."""
    adapters = _section(_section(context.model_yaml_config, "handler"), "adapters")
    model_dir = context.system_properties["model_dir"]
    return {str(name): path_in_archive(model_dir, str(path)) for name, path in adapters.items()}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"model-config.yaml: {name} should be a section of settings")
    return section


def _call(function: Callable[..., Any], offered: Mapping[str, Any]) -> Any:
    """Calls a function with those of the arguments that it takes: their number differs between versions of vLLM."""
    return function(**{name: offered[name] for name in inspect.signature(function).parameters if name in offered})
