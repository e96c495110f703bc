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
from wsgi_ts.errors import RequestTimeout, ServerError
from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)


class BlockingPlane:
    """The exchange of a process whose requests have a thread each.

    The segment is made on the first use: most processes that could predict never do.

    Args:
        instance: the instance.
        slots: requests under way at a time; by default what the configuration says.
    """

    def __init__(self, instance: Instance, slots: int | None = None) -> None:
        if slots is not None:
            instance = replace(instance, config=replace(instance.config, slots_per_worker=slots))
        self._instance = instance
        self._lock = threading.Lock()
        self._opened: Exchange[threading.Event] | None = None

    @property
    def routes(self) -> RoutingTable:
        """What the supervisor has published last.

        Raises:
            OutOfResources: /dev/shm is full.
        """
        routes = self._exchange.routes
        routes.refresh()
        return routes

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

        Args:
            target: where it goes.
            request_id: 36 ASCII characters.
            head: the request's head, for the handler.
            content_type: of the body, empty for none.
            body: the body.
            limit_s: seconds to wait at most, besides the model's own `clientTimeoutInMills`; then the error is a
                RequestTimeout, and what has not begun is never run.
        """
        if target.error is not None:
            return Answer(target.error)
        exchange = self._exchange
        event = threading.Event()
        request = Request(target, request_id, head, content_type, body, len(body), time.monotonic_ns())
        with self._lock:
            try:
                slot = exchange.take(target)
                exchange.submit(slot, event, target, request)
            except ServerError as error:
                return Answer(error)
            exchange.client.publish()
        limits = [limit_s, target.client_timeout_ms / 1000 or None]
        event.wait(min((limit for limit in limits if limit is not None), default=None))
        with self._lock:
            if not event.is_set():
                exchange.forget(slot)
                return Answer(RequestTimeout(TOO_LATE))
            answer = exchange.answer(slot, target)
            if answer.stream is None:
                answer.body = bytes(answer.body)
                exchange.finish(slot)
            else:
                answer.stream = self._stream(exchange, slot, event)
        return answer

    def _stream(self, exchange: Exchange[threading.Event], slot: int, event: threading.Event) -> Iterator[bytes]:
        state: int = SlotState.STREAMING
        try:
            while state == SlotState.STREAMING:
                with self._lock:
                    event.clear()
                    chunks, state = exchange.chunks(slot)
                yield from chunks
                if state == SlotState.STREAMING:
                    event.wait(1.0)
            if state == SlotState.FAILED:
                raise ConnectionError("the handler failed while it streamed its answer")
        finally:
            with self._lock:
                if state == SlotState.STREAMING:  # the client has gone
                    exchange.forget(slot)
                else:
                    exchange.finish(slot)

    @property
    def _exchange(self) -> Exchange[threading.Event]:
        with self._lock:
            if self._opened is None:
                try:
                    self._opened = Exchange(self._instance)
                except SharedMemoryFull as full:
                    raise no_memory(full) from full
                self._opened.listen(self._look, always=True)
            return self._opened

    def _look(self) -> None:
        """Wakes the threads whose requests have news."""
        try:
            with self._lock:
                if self._opened is not None:
                    for _, event in self._opened.news():
                        event.set()
        except Exception:  # the next ring is heard all the same
            log.exception("The answers of a turn cannot be looked after")
