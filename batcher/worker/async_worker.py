"""A model worker whose handler is asynchronous (`asyncCommunication`): each request by itself, many at a time.

Requests are taken from the mailbox as soon as they are there, and each becomes a task of one event loop; answers are
written in whatever order the tasks end. A thread waits for the mailbox's doorbell, which an event loop cannot watch.

No call here may block: a stream whose client reads slowly keeps its chunks in this process until the ring has room.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Generator
from typing import Any

from wsgi_ts.batcher.shm import layout, stream
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import SlotState
from wsgi_ts.batcher.shm.mailbox import WorkerMailbox
from wsgi_ts.batcher.worker.slots import SlotReference, WorkerSlots
from wsgi_ts.batcher.worker.worker import IDLE_S, ModelWorker
from wsgi_ts.handlers.serving.context import StreamClosed
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.log_records import Present
from wsgi_ts.handlers.serving.results import Answer
from wsgi_ts.handlers.serving.service import Service
from wsgi_ts.messages import ModelSpec
from wsgi_ts.tracing.options import TraceOptions

#: How often the requests under way are polled: has a client gone, can a chunk that waits be sent (seconds)?
POLL_S = 0.02
#: The same while chunks wait.
CLOGGED_S = 0.002
#: Bytes of all streams together that may wait for their clients, where handlers do not wait for room themselves.
MOST_WAITING = 64 * 1024 * 1024


class Backlog:
    """How much waits for clients that read too slowly, over all streams of a worker; any thread may change it.

    Attributes:
        held: bytes that wait now.
    """

    def __init__(self) -> None:
        self.held = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Notes that so many bytes more wait, or fewer where it is negative."""
        with self._lock:
            self.held += count


class AsyncWorker(ModelWorker):
    """Serves the requests of one mailbox as tasks of the handler's event loop."""

    def __init__(
        self,
        spec: ModelSpec,
        prefix: str,
        mailbox: WorkerMailbox,
        batcher_bell: Doorbell,
        traces: TraceOptions | None = None,
    ) -> None:
        super().__init__(spec, prefix, mailbox, batcher_bell, traces=traces)
        self._seen = 0  # the number that the thread has told of
        self._running: set[RunningRequest] = set()
        self._backlog = Backlog()
        self._ended: list[RunningRequest] = []
        self._fault: BaseException | None = None

    def serve(self) -> None:
        """Takes requests until the mailbox says stop and all tasks have ended, or the handler's device is broken."""
        service = self._service
        if service is None:
            raise RuntimeError("serve() before load()")
        loop = service.event_loop
        loop.run_until_complete(self._serve(service))
        loop.run_until_complete(_cancel_others())
        loop.run_until_complete(loop.shutdown_asyncgens())

    async def _serve(self, service: Service) -> None:
        news, loop = asyncio.Event(), asyncio.get_running_loop()
        threading.Thread(target=self._watch_mailbox, args=(loop, news), name="mailbox", daemon=True).start()
        clogged = False
        while not service.must_restart:
            self._take_over(service)
            if self._mailbox.stopping and not self._running:
                return
            try:
                await asyncio.wait_for(news.wait(), CLOGGED_S if clogged else POLL_S if self._running else IDLE_S)
            except asyncio.TimeoutError:
                if not self._running:
                    self._slots.forget_dead()
            news.clear()
            clogged = self._poll_requests()
            if self._fault is not None:
                raise self._fault

    def _watch_mailbox(self, loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
        """Body of the thread that waits for the doorbell."""
        mailbox, bell = self._mailbox, self._mailbox.bell
        while not mailbox.stopping:
            if bell.wait(lambda: mailbox.posted() != self._seen or mailbox.stopping):
                self._seen = mailbox.posted()
                with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
                    loop.call_soon_threadsafe(news.set)

    def _take_over(self, service: Service) -> None:
        """Starts a task for each request that was dispatched."""
        before, not_run = self._number, 0
        while self._mailbox.posted() > self._number:
            self._number += 1
            entries = self._mailbox.take_over(self._number)
            self._started_ns = time.monotonic_ns()
            refs, requests = self._accept(entries)
            for ref, request in zip(refs, requests, strict=True):
                ref.batch = self._batch_facts(len(self._running) + 1)
                running = RunningRequest(self._slots, ref, self._started_ns, self._backlog)
                self._running.add(running)
                running.task = asyncio.create_task(self._answer(service, running, request))
            if len(refs) < len(entries):
                not_run += len(entries) - len(refs)
                self._slots.ring_owners(entries)
        if self._number > before:
            self._mailbox.add_finished(not_run)
            self._batcher_bell.ring(layout.News.COMPLETION)

    async def _answer(self, service: Service, running: RunningRequest, request: Request) -> None:
        """The task of one request."""
        running.has_begun = True
        self._mailbox.count_execution()
        if self._exports:
            Present.request.set(self._running_now([running.ref], [request], has_span=False))
        try:
            await running.end(await service.answer(request, running.send))
        except BaseException as error:  # not the handler's doing: the slots can no longer be trusted
            self._fault = error
        self._running.discard(running)
        if not self._ended:
            asyncio.get_running_loop().call_soon(self._report)
        self._ended.append(running)

    def _report(self) -> None:
        """Tells of the requests that have ended in this turn of the event loop."""
        now, ended = time.monotonic_ns(), self._ended
        self._slots.ring_owners([running.ref.entry for running in ended])
        self._mailbox.end_step(now - sum(running.started_ns for running in ended) // len(ended))
        self._mailbox.add_finished(len(ended))
        ended.clear()
        self._batcher_bell.ring(layout.News.COMPLETION)

    def _poll_requests(self) -> bool:
        """Cancels the tasks whose client has gone, sends chunks that wait; returns whether some still do."""
        clogged = False
        for running in tuple(self._running):
            if running.ref.is_cancelled:
                running.cancel()
            elif running.is_clogged:
                clogged = not running.flush() or clogged
        return clogged


class RunningRequest:
    """One request under way: where it lies, its task, and the chunks of its answer that wait for room.

    `send` and `flush` may be called from any thread.

    Args:
        started_ns: monotonic time at which it was taken over.

    Attributes:
        has_begun: whether the task has run: one that is cancelled before that would end without a word.
    """

    def __init__(self, slots: WorkerSlots, ref: SlotReference, started_ns: int, backlog: Backlog) -> None:
        self.ref = ref
        self.started_ns = started_ns
        self.task: asyncio.Task[None] | None = None
        self.has_begun = False
        self._slots = slots
        self._lock = threading.Lock()
        self._backlog = backlog
        self._waiting: deque[bytes] = deque()
        self._has_ended = False
        self._is_cancelled = False

    @property
    def is_clogged(self) -> bool:
        """Whether chunks wait for room."""
        return bool(self._waiting)

    def cancel(self) -> None:
        """Cancels the task, once: a handler may take its time to clean up."""
        if self.task is not None and self.has_begun and not self._is_cancelled:
            self._is_cancelled = True
            self.task.cancel()

    def send(self, row: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> Room:
        """Sends one chunk, or keeps it until there is room; the first one sends status and headers.

        `row` is always 0.

        Returns:
            What a handler may await: it ends when nothing waits any more.

        Raises:
            StreamClosed: the client has gone, or the request has ended.
            SharedMemoryFull: /dev/shm has no room for the stream's ring.
            BufferError: chunks of this answer wait already, and with those of others they are too many.
        """
        with self._lock:
            if self._has_ended or self.ref.is_cancelled:
                raise StreamClosed("the client has closed the connection, or has its whole answer")
            if not self.ref.streamed:
                self._slots.open_stream(self.ref, Answer(status, phrase, headers, body, False), self.started_ns)
            # A stream whose client keeps up is not refused for what others leave unread.
            if self._waiting and self._backlog.held > MOST_WAITING:
                raise BufferError(
                    f"More than {MOST_WAITING >> 20} MiB of answers wait for clients that read too slowly, this one's "
                    "among them: await send_intermediate_predict_response(…), which ends when there is room."
                )
            self._keep(body)
        self.flush()
        return Room(self)

    def flush(self) -> bool:
        """Sends what waits, as far as there is room; True when nothing waits any more."""
        with self._lock:
            ref, waiting, before = self.ref, self._waiting, len(self._waiting)
            while waiting and not self._has_ended and stream.try_push(ref.segment, ref.slot, waiting[0]):
                self._backlog.add(-len(waiting.popleft()))
            if len(waiting) < before:
                if ref.state == SlotState.RUNNING:
                    ref.set_state(SlotState.STREAMING)
                self._slots.ring(ref.segment.index)
            return not waiting

    def _keep(self, body: bytes | bytearray | memoryview) -> None:
        pieces = list(stream.pieces_of(body))
        self._waiting.extend(pieces)
        self._backlog.add(sum(map(len, pieces)))

    async def room(self) -> None:
        """Waits until nothing waits any more, or the client has gone."""
        while not self.flush() and not self.ref.is_cancelled:
            await asyncio.sleep(CLOGGED_S)

    async def end(self, answer: Answer) -> None:
        """Writes the answer into the slot, or ends the stream with it as the last chunk."""
        ref = self.ref
        try:
            if ref.streamed and not answer.error:
                with self._lock:
                    self._keep(answer.body)
                await self.room()
        except asyncio.CancelledError:
            answer = answer._replace(error=True)
        with self._lock:
            self._has_ended = True
            self._backlog.add(-sum(map(len, self._waiting)))
            self._waiting.clear()
            if ref.is_cancelled:
                self._slots.count_end(ref, answer, time.monotonic_ns())
                ref.segment.fail_cancelled(ref.slot)
            elif ref.streamed:
                self._slots.count_end(ref, answer, time.monotonic_ns())
                ref.set_state(SlotState.FAILED if answer.error else SlotState.DONE)
            else:
                self._slots.write(ref, answer, self.started_ns, time.monotonic_ns())


class Room:
    """Awaitable that ends when a stream has room for more; one that nobody awaits costs nothing."""

    __slots__ = ("_exchange",)

    def __init__(self, running: RunningRequest) -> None:
        self._exchange = running

    def __await__(self) -> Generator[Any, None, None]:
        # At least one turn of the loop: a handler that has its tokens at hand must not hold up the others.
        yield from asyncio.sleep(0).__await__()
        yield from self._exchange.room().__await__()


async def _cancel_others() -> None:
    """Cancels what the handler has left running on the loop, and waits for its end."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
