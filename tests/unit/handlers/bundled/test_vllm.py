"""What `vllm_handler` makes of a model's YAML, how it finds vLLM's entry points, and how it ends a request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from wsgi_ts.handlers.bundled import vllm
from wsgi_ts.handlers.metrics.cache import MetricsCache
from wsgi_ts.handlers.serving.context import Context, StreamClosed
from wsgi_ts.handlers.toolkit.library_names import VLLM_KV_CACHE_GAUGES


def context_of(model_dir: Path, **section: Any) -> Context:
    config = {"handler": section}
    return Context("m", str(model_dir), None, 1, None, metrics=MetricsCache(None, "m"), model_yaml_config=config)


def test_a_model_of_the_hub_is_served_under_its_name(tmp_path: Path) -> None:
    settings = vllm.engine_settings(
        context_of(tmp_path, vllm_engine_config={"model": "org/name", "max_model_len": None})
    )
    assert settings == {"model": "org/name", "served_model_name": ["org/name"]}


def test_a_model_of_the_archive_is_served_under_the_name_in_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    settings = vllm.engine_settings(context_of(tmp_path, model_path="weights", vllm_engine_config={"dtype": "half"}))
    assert settings == {"model": str(tmp_path / "weights"), "served_model_name": ["weights"], "dtype": "half"}


@pytest.mark.parametrize("given", ["one", ["one", "two"]])
def test_names_that_are_given_count(tmp_path: Path, given: Any) -> None:
    settings = vllm.engine_settings(
        context_of(tmp_path, model_path="org/name", vllm_engine_config={"served_model_name": given})
    )
    assert settings["served_model_name"] == ([given] if isinstance(given, str) else given)


def test_a_chat_template_is_a_file_or_itself(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").touch()
    for given, expected in (("chat.jinja", str(tmp_path / "chat.jinja")), ("{{ m }}\n" * 500, "{{ m }}\n" * 500)):
        settings = vllm.engine_settings(context_of(tmp_path, model_path="org/name", chat_template=given))
        assert settings["chat_template"] == expected


@pytest.mark.parametrize("section", [{}, {"vllm_engine_config": {"max_num_seqs": 1}}, {"vllm_engine_config": "fast"}])
def test_a_section_that_is_wrong_is_refused(tmp_path: Path, section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model-config\.yaml"):
        vllm.engine_settings(context_of(tmp_path, **section))


def test_a_function_gets_the_arguments_that_it_takes() -> None:
    assert vllm._call(lambda state, args: (state, args), {"args": 1, "state": 2, "supported_tasks": 3}) == (2, 1)


def test_a_derived_class_that_does_not_await_is_told(tmp_path: Path) -> None:
    context = context_of(tmp_path)._for_request("id", {"url_path": "v1/models"}, None, None)
    with pytest.raises(RuntimeError, match="await super"):
        asyncio.run(vllm.VLLMHandler().handle([{}], context))


def test_a_derived_class_may_change_request_and_answer() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"got": ' + body + b"}"})

    class Polite(vllm.VLLMHandler):
        async def preprocess(self, requests: list[Any], context: Context) -> list[Any]:
            (text,) = await super().preprocess(requests, context)
            return [{**json.loads(text), "please": True}]

        async def postprocess(self, inference_outputs: list[Any]) -> list[Any]:
            (answer,) = await super().postprocess(inference_outputs)
            return [answer.upper()]

    async def ask(handler: vllm.VLLMHandler) -> list[Any]:
        handler.application = application
        base = Context("m", "/", None, 1, None)
        context = base._for_request("id", {"url_path": "v1/completions"}, None, MetricsCache(None, "m"))
        return await handler.handle([{"body": b'{"prompt": "\xff"}'}], context)

    # What is no UTF-8 is for the application to refuse.
    assert asyncio.run(ask(vllm.VLLMHandler())) == [b'{"got": {"prompt": "\xff"}}']
    assert asyncio.run(ask(Polite())) == [b'{"GOT": {"PROMPT": "\\UDCFF", "PLEASE": TRUE}}']


async def run_until_cancelled(application: Any, send_chunk: Any = None) -> None:
    base = Context("m", "/", None, 1, None)
    context = base._for_request("id", {"url_path": "v1/completions"}, send_chunk, MetricsCache(None, "m"))
    handler = vllm.VLLMHandler()
    handler.application = application
    task = asyncio.create_task(handler.handle([{"body": {}}], context))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_application_is_told_that_the_client_has_gone() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])
        seen.append(await receive())

    asyncio.run(run_until_cancelled(application))
    assert seen == [b"{}", {"type": "http.disconnect"}]


def test_an_application_that_does_not_listen_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("cancelled")

    monkeypatch.setattr(vllm, "_FAREWELL_S", 0.01)
    asyncio.run(run_until_cancelled(application))
    assert ended == ["cancelled"]


def test_a_closed_stream_is_no_error_of_the_application() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        assert await receive() == {"type": "http.disconnect"}

    def closed(*chunk: Any) -> None:
        raise StreamClosed

    async def run() -> list[Any]:
        context = Context("m", "/", None, 1, None)
        context = context._for_request("id", {"url_path": "v1/completions"}, closed, MetricsCache(None, "m"))
        handler = vllm.VLLMHandler()
        handler.application = application
        return await handler.handle([{"body": "{}"}], context)

    assert asyncio.run(run()) == [b""]


@pytest.mark.parametrize("names", [VLLM_KV_CACHE_GAUGES, VLLM_KV_CACHE_GAUGES[1:]], ids=["new", "old"])
def test_the_use_of_the_kv_cache_is_read_where_vllm_records_it(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    assert vllm.kv_cache_usage() is None
    # Some versions record the same under both names.
    for name in names:
        gauge = prometheus_client.Gauge(name, "KV-cache usage.", ["model_name", "engine"], registry=registry)
        gauge.labels("org/name", "0").set(0.25)
        gauge.labels("org/name", "1").set(0.75)
    assert vllm.kv_cache_usage() == 0.5


def test_the_server_is_told_of_the_kv_cache_until_vllm_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usages: list[float | None] = [None, 0.5, 1.0000001]
    told: list[float] = []
    monkeypatch.setattr(vllm, "kv_cache_usage", lambda: usages.pop(0))
    monkeypatch.setattr(vllm, "_KV_CACHE_LOOK_S", 0)
    context = Context("m", "/", None, 1, None)
    context._kv_cache_sink = told.append
    asyncio.run(vllm._watch_kv_cache(context))
    assert told == [0.5, 1.0]
    (record,) = caplog.records
    assert record.getMessage().startswith("vLLM does not say how full its KV cache is")
    assert record.exc_info is not None and isinstance(record.exc_info[1], IndexError)
