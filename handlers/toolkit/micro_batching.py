"""Micro-batching: a handler's batch is cut up, and the pieces go through its phases like through a pipeline.

While one piece is in inference, the next is preprocessed and the one before postprocessed, each phase in
threads of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from queue import Queue
from threading import Thread, local
from typing import Any, NamedTuple

from wsgi_ts.handlers.serving.context import Context

#: The phases, in the order in which a piece goes through them.
HANDLER_METHODS = ("preprocess", "inference", "postprocess")


class _Piece(NamedTuple):
    """One micro-batch on its way. `finished` is where it goes in the end; `error` is what stopped it."""

    number: int
    data: Any
    finished: Queue[_Piece]
    error: BaseException | None = None


class MicroBatching:
    """Replaces a handler's `handle`: `handler.handle = MicroBatching(handler, micro_batch_size=4)`.

    Args:
        handler: has preprocess, inference and postprocess, as `BaseHandler` has.
        micro_batch_size: rows of one piece.
        parallelism: threads per phase; 1 each by default. A phase with 0 threads is
            done by the threads of the phase before it, the first by the caller.

    Raises:
        ValueError: a size below 1, an unknown phase or a negative number of threads.
    """

    def __init__(self, handler: Any, micro_batch_size: int = 1, parallelism: Mapping[str, int] | None = None) -> None:
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size}, but must be at least 1")
        self.handler = handler
        self.micro_batch_size = micro_batch_size
        self.queues: dict[str, Queue[_Piece | None]] = {}
        self.thread_groups: dict[str, list[Thread]] = {}
        self._current = local()
        self._first_phase: str | None = None
        self._caller_phases: Sequence[str] = HANDLER_METHODS
        self._parallelism = dict.fromkeys(HANDLER_METHODS, 1)
        self._set_parallelism(parallelism or {})
        self._start()

    @property
    def parallelism(self) -> dict[str, int]:
        """Threads per phase, as a copy; what is assigned is merged into it."""
        return dict(self._parallelism)

    @parallelism.setter
    def parallelism(self, parallelism: Mapping[str, int]) -> None:
        self._set_parallelism(parallelism)
        self.shutdown()
        self._start()

    def get_micro_batch_idx(self) -> int | None:
        """Returns the number, from 0, of the piece that the calling thread works on; None where it has none."""
        number: int | None = getattr(self._current, "number", None)
        return number

    def shutdown(self) -> None:
        """Ends the threads, after what they were given is done."""
        for method, threads in self.thread_groups.items():
            for _ in threads:
                self.queues[method].put(None)
            for thread in threads:
                thread.join()
        self.thread_groups = {}
        self.queues = {}

    def __call__(self, data: list[Any], context: Context) -> Any:
        """Answers a batch of B rows with a list of B results, in their order; raises what any phase has raised."""
        started_at = time.perf_counter()
        handler = self.handler
        handler.context = context
        if os.environ.get("ENABLE_TORCH_PROFILER") is not None:
            output, _ = handler._infer_with_profiler(data)
        elif handler._is_describe():
            output = [handler.describe_handle()]
        elif handler._is_explain():
            output = handler.explain_handle(handler.preprocess(data), data)
        else:
            output = self._run(data)
        elapsed_ms = (time.perf_counter() - started_at) * 1000
        context.metrics.add_time("HandlerTime", round(elapsed_ms, 2), None, "ms")
        return output

    def _run(self, data: list[Any]) -> list[Any]:
        size = self.micro_batch_size
        finished: Queue[_Piece] = Queue()
        starts = range(0, len(data), size)
        for number, start in enumerate(starts):
            piece = self._go_through(self._caller_phases, _Piece(number, data[start : start + size], finished))
            self._pass_on(piece, self._first_phase)
        done = sorted((finished.get() for _ in starts), key=lambda piece: piece.number)
        for piece in done:
            if piece.error is not None:
                raise piece.error
        return [row for piece in done for row in piece.data]

    def _set_parallelism(self, parallelism: Mapping[str, int]) -> None:
        for method, threads in parallelism.items():
            if method not in HANDLER_METHODS:
                raise ValueError(f'parallelism has no phase "{method}": use {", ".join(HANDLER_METHODS)}')
            if threads < 0:
                raise ValueError(f"parallelism of {method} is {threads}, but must be 0 or more")
        self._parallelism.update(parallelism)

    def _start(self) -> None:
        """Makes queue and threads of each phase; one without threads is done by those of the phase before."""
        threaded = [method for method in HANDLER_METHODS if self._parallelism[method] > 0]
        self.queues = {method: Queue() for method in threaded}
        self._first_phase = threaded[0] if threaded else None
        bounds = [HANDLER_METHODS.index(method) for method in threaded] + [len(HANDLER_METHODS)]
        self._caller_phases = HANDLER_METHODS[: bounds[0]]
        for position, method in enumerate(threaded):
            phases = HANDLER_METHODS[bounds[position] : bounds[position + 1]]
            following = threaded[position + 1] if position + 1 < len(threaded) else None
            threads = [
                Thread(target=self._work, args=(phases, following), name=f"{method}-{number}", daemon=True)
                for number in range(self._parallelism[method])
            ]
            self.thread_groups[method] = threads
            for thread in threads:
                thread.start()

    def _work(self, phases: Sequence[str], following: str | None) -> None:
        """The life of one thread: takes pieces until it gets None."""
        waiting = self.queues[phases[0]]
        while (piece := waiting.get()) is not None:
            self._pass_on(self._go_through(phases, piece), following)

    def _go_through(self, phases: Sequence[str], piece: _Piece) -> _Piece:
        self._current.number = piece.number
        try:
            for method in phases:
                piece = piece._replace(data=getattr(self.handler, method)(piece.data))
        except BaseException as error:
            # Whatever it is, it belongs to the caller of the batch, not to this thread.
            return piece._replace(error=error)
        finally:
            self._current.number = None
        return piece

    def _pass_on(self, piece: _Piece, following: str | None) -> None:
        if piece.error is not None or following is None:
            piece.finished.put(piece)
        else:
            self.queues[following].put(piece)
