"""Predictions for servers with a thread per request: submit, wait, answer (gunicorn's gthread, describe requests)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from wsgi_ts.batcher.shm.layout import TOO_LATE, SlotState
from wsgi_ts.batcher.shm.request_codec import Answer, Request
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.exchange import Exchange, no_memory
from wsgi_ts.dataplane.routes import RoutingTable, Target
from wsgi_ts.errors import InternalServerError, RequestTimeout, ServerError
from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

#: How often the limits of a workflow's nodes are looked at.
_LOOK_S = 0.25


class _Waiting:
    """One request that a thread waits for.

    Attributes:
        news: set when there is something to look at.
        slot: where the answer lies, or the number under which the exchange knows the request.
        answer: one that lies in no slot.
    """

    def __init__(self) -> None:
        self.news = threading.Event()
        self.slot = -1
        self.answer: Answer | None = None


class BlockingPlane:
    """The exchange of a process whose requests have a thread each.

    The segment is made on the first use: most processes that could predict never do.

    Args:
        slots: requests under way at a time; by default what the configuration says.
    """

    def __init__(self, instance: Instance, slots: int | None = None) -> None:
        if slots is not None:
            instance = replace(instance, config=replace(instance.config, slots_per_worker=slots))
        self._instance = instance
        self._lock = threading.Lock()
        self._opened: Exchange[_Waiting] | None = None

    @property
    def routes(self) -> RoutingTable:
        """What the supervisor has published last.

        Raises:
            OutOfResources: /dev/shm is full.
        """
        routes = self._exchange.routes
        routes.refresh()
        return routes

    def refuse(self, target: Target, error: ServerError) -> ServerError:
        """Counts a request that is refused before it is submitted, and returns the error that says why."""
        exchange = self._exchange
        with self._lock:
            return exchange.refuse(target, error)

    def predict(
        self,
        target: Target,
        request_id: str,
        head: bytes,
        content_type: bytes,
        body: bytes,
        limit_s: float | None = None,
    ) -> Answer:
        """Submits a request and waits for its answer; errors come back in the answer.

        `request_id` has 36 ASCII characters. `limit_s` says how many seconds to wait at most, besides the model's own
        `clientTimeoutInMills`; then the error is a RequestTimeout, and what has not begun is never run.
        """
        exchange = self._exchange
        if target.error is not None:
            return Answer(exchange.refuse(target, target.error))
        waiting = _Waiting()
        request = Request(target, request_id, head, content_type, body, len(body), time.monotonic_ns())
        with self._lock:
            try:
                waiting.slot = exchange.submit(exchange.take(target), waiting, target, request)
            except ServerError as error:
                return Answer(error)
            exchange.client.publish()
        if target.graph is None:
            limits = [limit_s, target.client_timeout_ms / 1000 or None]
            waiting.news.wait(min((limit for limit in limits if limit is not None), default=None))
        else:
            self._wait_for_walk(exchange, waiting)
        with self._lock:
            if waiting.answer is not None:
                return waiting.answer
            if not waiting.news.is_set():
                exchange.forget(waiting.slot)
                return Answer(RequestTimeout(TOO_LATE))
            answer = exchange.answer(waiting.slot, target)
            if answer.stream is None:
                answer.body = bytes(answer.body)
                exchange.finish(waiting.slot)
            else:
                answer.stream = self._stream(exchange, waiting)
        return answer

    @staticmethod
    def body_of(answer: Answer) -> bytes:
        """Returns the body of an answer without error; of a streamed one all its parts.

        Raises:
            InternalServerError: the handler has failed while it streamed.
        """
        if answer.stream is None:
            return bytes(answer.body)
        try:
            return b"".join(answer.stream)
        except ConnectionError as error:
            raise InternalServerError("Prediction failed") from error

    def _wait_for_walk(self, exchange: Exchange[_Waiting], waiting: _Waiting) -> None:
        """Waits for a workflow's answer, and has its nodes' limits looked at when they are over."""
        handle = waiting.slot
        with self._lock:
            limit_ns = exchange.walks.limit_of(handle)
        # Not longer than a moment: a node that follows may have an earlier limit.
        while not waiting.news.wait(max(0.0, min(_LOOK_S, (limit_ns - time.monotonic_ns()) / 1e9))):
            with self._lock:
                limit_ns = exchange.walks.limit_of(handle)
                if 0 < limit_ns <= time.monotonic_ns():
                    limit_ns = exchange.walks.look(handle)

    def _stream(self, exchange: Exchange[_Waiting], waiting: _Waiting) -> Iterator[bytes]:
        state: int = SlotState.STREAMING
        try:
            while state == SlotState.STREAMING:
                with self._lock:
                    waiting.news.clear()
                    chunks, state = exchange.chunks(waiting.slot)
                yield from chunks
                if state == SlotState.STREAMING:
                    waiting.news.wait(1.0)
            if state == SlotState.FAILED:
                raise ConnectionError("the handler failed while it streamed its answer")
        finally:
            with self._lock:
                if state == SlotState.STREAMING:  # the client has gone
                    exchange.forget(waiting.slot)
                else:
                    exchange.finish(waiting.slot)

    @property
    def _exchange(self) -> Exchange[_Waiting]:
        with self._lock:
            if self._opened is None:
                try:
                    self._opened = Exchange(self._instance)
                except SharedMemoryFull as full:
                    raise no_memory(full) from full
                self._opened.walks.deliver = _deliver
                self._opened.listen(self._look, always=True)
            return self._opened

    def _look(self) -> None:
        """Wakes the threads whose requests have news."""
        try:
            with self._lock:
                if self._opened is not None:
                    for slot, waiting in self._opened.news():
                        waiting.slot = slot
                        waiting.news.set()
                    self._opened.client.publish()
        except Exception:  # the next ring is heard all the same
            log.exception("The answers of a turn cannot be looked after")


def _deliver(waiting: _Waiting, answer: Answer) -> None:
    waiting.answer = answer
    waiting.news.set()
