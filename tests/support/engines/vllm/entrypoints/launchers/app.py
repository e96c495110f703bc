"""An ASGI application with OpenAI's paths, written by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from letters import continue_text

Send = Callable[[dict[str, Any]], Awaitable[None]]


def build_app(args: argparse.Namespace, supported_tasks: tuple[Any, ...], model_config: Any = None) -> Application:
    """The application, whose state `init_app_state` fills."""
    assert supported_tasks == ("generate",)
    return Application()


class Application:
    """Answers a completion with the letters that follow the prompt's last one."""

    def __init__(self) -> None:
        self.state = SimpleNamespace()

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """One request."""
        headers = dict(scope["headers"])
        body = (await receive())["body"]
        assert scope["type"] == "http"
        assert int(headers[b"content-length"]) == len(body)
        if (scope["method"], scope["path"]) == ("GET", "/v1/models"):
            await answer(send, 200, {"object": "list", "data": self.state.models})
            return
        try:
            request = json.loads(body)
        except ValueError:
            await refuse(send, 400, "JSON decode error")
            return
        if request.get("model") not in {model["id"] for model in self.state.models}:
            await refuse(send, 404, f"The model `{request.get('model')}` does not exist.")
            return
        chat = scope["path"].endswith("/chat/completions")
        prompt = request["messages"][-1]["content"] if chat else request["prompt"]
        if prompt == "die":
            self.state.engine.errored = True
            self.state.server.should_exit = True
        identity = "cmpl-" + headers[b"x-request-id"].decode()
        await self.generate(send, receive, request, prompt, identity, chat)

    async def generate(self, send: Send, receive: Any, request: Any, prompt: str, identity: str, chat: bool) -> None:
        """Generates until all is said, or the client has gone."""
        engine = self.state.engine
        gone = asyncio.ensure_future(receive())
        engine.running += 1
        text = ""
        if request.get("stream"):
            await start(send, 200, b"text/event-stream; charset=utf-8")
        try:
            async for letter in continue_text(engine.model, prompt, request.get("max_tokens", 16)):
                text += letter
                if gone.done():
                    assert gone.result() == {"type": "http.disconnect"}
                    engine.aborted += 1
                    return
                if request.get("stream"):
                    choice = {"index": 0, "delta": {"content": letter}} if chat else {"index": 0, "text": letter}
                    line = json.dumps({"id": identity, "choices": [choice]})
                    await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True})
        finally:
            gone.cancel()
            engine.kv_cache_usage.set((len(prompt) + len(text)) / engine.model_config.max_model_len)
            engine.running -= 1
        if request.get("stream"):
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        usage = {"completion_tokens": len(text), "running": engine.running, "aborted": engine.aborted}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}} if chat else {"index": 0, "text": text}
        await answer(send, 200, {"id": identity, "choices": [choice], "usage": usage})


async def start(send: Send, status: int, content_type: bytes) -> None:
    """Sends status and headers."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})


async def answer(send: Send, status: int, document: Any) -> None:
    """Sends a whole answer, in two parts."""
    await start(send, status, b"application/json")
    text = json.dumps(document).encode()
    await send({"type": "http.response.body", "body": text[:5], "more_body": True})
    await send({"type": "http.response.body", "body": text[5:]})


async def refuse(send: Send, status: int, message: str) -> None:
    """Sends an error in OpenAI's form."""
    await answer(send, status, {"error": {"message": message, "type": "BadRequestError", "code": status}})
