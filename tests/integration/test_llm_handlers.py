"""`vllm_handler` and `trt_llm_handler` through the server, over stand-ins for their engines (tests/support/engines)."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.archives import archive
from support.engines import engine_files
from support.eventually import eventually
from support.http import Reply
from support.server import WITH_TORCH, ServerProcess

VLLM = """
minWorkers: 1
maxWorkers: 1
asyncCommunication: true
handler:
  model_path: letters-26
  chat_template: template.jinja
  adapters:
    capitals: adapters/capitals
    far: someone/far-adapter
  vllm_engine_config:
    max_num_seqs: 16
    max_model_len:
    no_such_argument: 1
"""

TRT_LLM = """
minWorkers: 1
maxWorkers: 1
asyncCommunication: true
handler:
  engine_dir: engine
  tokenizer_dir: someone/tokenizer
  kv_cache_config:
    free_gpu_memory_fraction: 0.1
"""


def bundled(server: ServerProcess, name: str, handler: str, package: str, config: str, **files: str) -> Reply:
    """Registers a model with a bundled handler, whose archive holds the stand-in for the engine's package."""
    contents: dict[str, bytes | str] = {**engine_files(package), **files} if package else {}
    archive(server.store, name, "", config_yaml=config, files=contents, manifest_overrides={"handler": handler})
    return server.register(f"{name}.mar")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    metrics = {"metrics_mode": "prometheus", "vllm_metric_names": "true"}
    with ServerProcess(config=WITH_TORCH | metrics) as running:
        extra = {"template.jinja": "{{ messages }}", "adapters/capitals/adapter.json": "{}"}
        assert bundled(running, "llm", "vllm_handler", "vllm", VLLM, **extra).status == 200
        assert bundled(running, "trt", "trt_llm_handler", "tensorrt_llm", TRT_LLM, **{"engine/x": ""}).status == 200
        yield running


def is_logged(server: ServerProcess, text: str) -> None:
    """Waits for a line of a model."""
    eventually(lambda: text in server.log("model_log.log"), within=20, what=f'"{text}" in model_log.log')


def ask(server: ServerProcess, path: str, request: dict[str, Any] | None = None) -> Reply:
    body = None if request is None else json.dumps(request)
    method = "GET" if request is None else "POST"
    headers = {"content-type": "application/json"} if body else {}
    return server.request("inference", method, f"/predictions/llm/1.0/{path}", headers=headers, body=body)


def completion(server: ServerProcess, **fields: Any) -> Reply:
    return ask(server, "v1/completions", {"model": "letters-26", "prompt": "ab", "max_tokens": 3, **fields})


def test_the_models_are_listed_by_the_names_of_the_yaml(server: ServerProcess) -> None:
    reply = ask(server, "v1/models")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    models = {model["id"]: model for model in reply.json()["data"]}
    assert set(models) == {"letters-26", "capitals", "far"}
    # A null in the YAML leaves vLLM's own default; a file or folder of the archive gets its path.
    assert models["letters-26"]["max_model_len"] == 64
    assert models["letters-26"]["max_num_seqs"] == 16
    assert models["letters-26"]["root"] == "letters-26"
    assert models["letters-26"]["chat_template"] == "{{ messages }}"
    assert models["capitals"]["root"].endswith("/adapters/capitals")
    assert models["capitals"]["root"].startswith("/")
    assert models["far"]["root"] == "someone/far-adapter"


def test_an_argument_that_vllm_does_not_know_is_named_in_the_log(server: ServerProcess) -> None:
    is_logged(server, "handler.vllm_engine_config.no_such_argument")


def test_a_completion(server: ServerProcess) -> None:
    reply = completion(server)
    assert reply.status == 200
    assert reply.json()["choices"] == [{"index": 0, "text": "cde"}]
    assert reply.json()["id"] == f"cmpl-{reply.headers['x-request-id']}"


def test_the_metrics_have_the_engines_use_of_its_kv_cache(server: ServerProcess) -> None:
    def usage() -> list[str]:
        lines = server.request("metrics", "GET", "/metrics").text.splitlines()
        return [line for line in lines if line.startswith("vllm:kv_cache_usage_perc{")]

    eventually(lambda: len(usage()) == 1, within=5)  # from the start, and only of the model that tells it
    assert completion(server, prompt="a" * 30, max_tokens=2).status == 200
    eventually(lambda: usage() == ['vllm:kv_cache_usage_perc{model_name="llm",} 0.5'], within=5)


def test_a_chat_completion(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "xy"}]
    reply = ask(server, "v1/chat/completions", {"model": "capitals", "messages": messages, "max_tokens": 2})
    assert reply.json()["choices"][0]["message"] == {"role": "assistant", "content": "za"}


def test_a_stream_has_one_event_per_chunk(server: ServerProcess) -> None:
    reply = completion(server, stream=True)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert texts == ["c", "d", "e"]


def test_a_body_without_content_type_is_read_as_json(server: ServerProcess) -> None:
    request = json.dumps({"model": "letters-26", "prompt": "m", "max_tokens": 1})
    reply = server.request("inference", "POST", "/predictions/llm/1.0/v1/completions", body=request)
    assert reply.json()["choices"][0]["text"] == "n"


def test_errors_are_those_of_the_engine_with_their_status(server: ServerProcess) -> None:
    unknown = completion(server, model="other")
    assert (unknown.status, unknown.json()["error"]["code"]) == (404, 404)
    broken = server.request("inference", "POST", "/predictions/llm/1.0/v1/completions", body="{")
    assert (broken.status, broken.json()["error"]["message"]) == (400, "JSON decode error")


@pytest.mark.parametrize("path", ["v1/embeddings", "v1", "v1/models/x"])
def test_another_path_is_not_there(server: ServerProcess, path: str) -> None:
    reply = ask(server, path, {})
    assert (reply.status, reply.json()["message"]) == (404, f"Unknown API endpoint: {path}")


def test_many_requests_share_the_engine(server: ServerProcess) -> None:
    def running() -> int:
        return int(completion(server).json()["usage"]["running"])

    # One goes on until its client leaves, so that all others share the engine with it.
    with asking(server, max_tokens=10_000_000), ThreadPoolExecutor(8) as pool:
        eventually(lambda: running() == 1, within=20)
        replies = list(pool.map(lambda _: completion(server, max_tokens=200), range(24)))
    assert {len(reply.json()["choices"][0]["text"]) for reply in replies} == {200}
    assert min(reply.json()["usage"]["running"] for reply in replies) > 0
    eventually(lambda: running() == 0, within=20)


@contextlib.contextmanager
def asking(server: ServerProcess, **fields: Any) -> Iterator[socket.socket]:
    """A request under way whose client leaves at the end of the block."""
    body = json.dumps({"model": "letters-26", "prompt": "a", **fields}).encode()
    with socket.create_connection(("127.0.0.1", server.ports["inference"]), 60) as sock:
        sock.sendall(
            b"POST /predictions/llm/1.0/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        yield sock


def test_the_engine_is_told_that_a_client_has_gone(server: ServerProcess) -> None:
    before = completion(server).json()["usage"]["aborted"]
    with asking(server, max_tokens=10_000_000, stream=True) as sock:
        assert b"200" in sock.recv(100)
    eventually(lambda: completion(server).json()["usage"]["aborted"] == before + 1, within=20)
    assert completion(server).json()["usage"]["running"] == 0


def test_a_dead_engine_gets_a_new_worker(server: ServerProcess) -> None:
    reply = completion(server, prompt="die")
    assert (reply.status, reply.json()["message"]) == (500, "Worker died.")
    eventually(lambda: completion(server).status == 200, within=30)
    is_logged(server, "vLLM's engine is dead")


def test_a_missing_package_is_named(server: ServerProcess) -> None:
    for handler, package in (("vllm_handler", "vllm"), ("trt_llm_handler", "tensorrt-llm")):
        config = (VLLM if package == "vllm" else TRT_LLM) + "maxRetryTimeoutInSec: 0\n"
        assert bundled(server, f"without-{package}", handler, "", config).status == 500
        is_logged(server, f"needs the package {package}")


def test_a_yaml_without_model_is_told(server: ServerProcess) -> None:
    config = "minWorkers: 1\nmaxWorkers: 1\nasyncCommunication: true\nmaxRetryTimeoutInSec: 0\n"
    assert bundled(server, "nameless", "vllm_handler", "vllm", config).status == 500
    is_logged(server, "names no model: add handler.model_path")


def trt(server: ServerProcess, **fields: Any) -> Reply:
    return server.predict("trt", json.dumps(fields), content_type="application/json")


def test_trt_llm_answers_with_the_text(server: ServerProcess) -> None:
    assert trt(server, prompt="a", max_tokens=4).text == "bcde"
    is_logged(server, "/engine someone/tokenizer 0.1")


def test_trt_llm_streams_pieces_of_text(server: ServerProcess) -> None:
    reply = trt(server, prompt="a", max_tokens=3, streaming=True)
    assert reply.text == "".join(json.dumps({"text": letter}) for letter in "bcd")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 3}, 'The request needs a field "prompt" with a text'),
        ({"prompt": "a", "no_such": 1}, "Wrong sampling parameters"),
    ],
)
def test_trt_llm_refuses_what_it_cannot_use(server: ServerProcess, fields: dict[str, Any], message: str) -> None:
    reply = trt(server, **fields)
    assert reply.status == 400
    assert message in reply.json()["message"]


def test_trt_llm_ends_the_generation_of_a_client_that_has_gone(server: ServerProcess) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 10_000_000, "streaming": True}).encode()
    with socket.create_connection(("127.0.0.1", server.ports["inference"]), 30) as sock:
        sock.sendall(b"POST /predictions/trt HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert b"200" in sock.recv(100)
    is_logged(server, "generation aborted")
