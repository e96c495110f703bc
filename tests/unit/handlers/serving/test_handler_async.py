"""Requests that an async handler answers one by one: what each has of its own, and what an error means."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from wsgi_ts.handlers.metrics.metric import Sample
from wsgi_ts.handlers.serving.context import StreamClosed
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.results import Answer
from wsgi_ts.handlers.serving.service import Service

LoadModel = Callable[..., Service]

HANDLER = """
import asyncio
from ts.handler_utils.utils import send_intermediate_predict_response

class Handler:
    async def initialize(self, context):
        self.loop = asyncio.get_running_loop()
        self.barrier = []

    async def handle(self, data, context):
        assert asyncio.get_running_loop() is self.loop
        return await getattr(self, data[0]["body"])(context)

    async def count(self, context):
        self.barrier.append(context)
        while len(self.barrier) < 2:
            await asyncio.sleep(0)
        context.metrics.add_counter("Seen", 1)
        return [context.get_request_id(0)]

    async def send(self, context):
        await send_intermediate_predict_response(["part"], context.request_ids, "", 200, context)
        return ["end"]

    async def hang(self, context):
        await asyncio.sleep(3600)
"""


def request(name: str, body: str) -> Request:
    return Request(name, {"body": body}, {})


def send_nothing(*chunk: Any) -> None:
    raise AssertionError("no chunk was expected")


def run(service: Service, *requests: Request, send: Any = send_nothing) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        return list(await asyncio.gather(*(service.answer(each, send) for each in requests)))

    return service.event_loop.run_until_complete(all_of_them())


def test_metrics_belong_to_the_request_that_recorded_them(load_model: LoadModel) -> None:
    samples: list[Sample] = []
    service = load_model("h.py", {"h.py": HANDLER}, sink=samples.extend)
    answers = run(service, request("one", "count"), request("two", "count"))
    assert [answer.body for answer in answers] == [b"one", b"two"]
    seen = [sample for sample in samples if sample.name == "Seen"]
    assert sorted(sample.request_ids for sample in seen) == ["one", "two"]


def test_a_chunk_may_be_awaited(load_model: LoadModel) -> None:
    waited: list[str] = []

    async def room() -> None:
        waited.append("for room")

    service = load_model("h.py", {"h.py": HANDLER})
    [answer] = run(service, request("one", "send"), send=lambda *chunk: room())
    assert (answer.body, answer.error, waited) == (b"end", False, ["for room"])


def test_a_client_that_has_gone_is_no_failure_of_the_handler(
    load_model: LoadModel, caplog: pytest.LogCaptureFixture
) -> None:
    def closed(*chunk: Any) -> None:
        raise StreamClosed

    service = load_model("h.py", {"h.py": HANDLER})

    async def cancel_it() -> Answer:
        task = asyncio.ensure_future(service.answer(request("two", "hang"), send_nothing))
        await asyncio.sleep(0)
        task.cancel()
        return await task

    with caplog.at_level(logging.DEBUG):
        [answer] = run(service, request("one", "send"), send=closed)
        assert answer.error
        assert service.event_loop.run_until_complete(cancel_it()).error
    assert "Invoking custom service failed" not in caplog.text
