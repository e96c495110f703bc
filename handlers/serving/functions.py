"""The functions of a workflow's handler file, which share one model worker: each a service of its own.

As in TorchServe a function is called once with no data when it is loaded, and then with one request at a time, unless
the workflow asks for more.
"""

from __future__ import annotations

import inspect
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from wsgi_ts.handlers.serving.context import SendChunk
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.results import encode
from wsgi_ts.handlers.serving.service import MetricsSink, Service
from wsgi_ts.messages import FUNCTION_FAILED, FunctionKind, ModelSpec
from wsgi_ts.quick_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class FunctionHost:
    """All functions of one workflow.

    Attributes:
        services: by the name under which they are asked for; there is at least one.
        batch_sizes: how many requests each takes at a time.
    """

    services: dict[str, Service]
    batch_sizes: dict[str, int]

    @classmethod
    def load(
        cls, spec: ModelSpec, gpu_id: int | None, send_chunk: SendChunk, metrics_sink: MetricsSink | None = None
    ) -> FunctionHost:
        """Imports the handler file and calls each of `spec.functions`, which are not empty, without data.

        Raises:
            LoadError: as `Service.load`.
            BaseException: anything else that a function raises; the name of the function is the last line on stderr.
        """
        services, batch_sizes = {}, {}
        for name, function in spec.functions.items():
            own = replace(
                spec,
                name=function["model"],
                shown_name=function["shown"],
                handler=f"{spec.handler}:{function['function']}",
                batch_size=function["batch_size"],
                functions={},
            )
            try:
                services[name] = Service.load(
                    own, gpu_id, send_chunk, metrics_sink=metrics_sink, shape=_SHAPES.get(function["kind"])
                )
            except BaseException:
                print(f"{FUNCTION_FAILED}{name}", file=sys.stderr, flush=True)
                raise
            batch_sizes[name] = function["batch_size"]
        return cls(services, batch_sizes)

    @property
    def must_restart(self) -> bool:
        """True once the device of one of them is broken, so that a new process is needed."""
        return any(service.must_restart for service in self.services.values())

    def batches(self, requests: list[Request]) -> Iterator[list[int]]:
        """Yields which requests are answered together, in their order, by their places in the list."""
        batch: list[int] = []
        for place, request in enumerate(requests):
            before = requests[batch[0]].function if batch else request.function
            if batch and (before != request.function or len(batch) >= self.batch_sizes.get(before, 1)):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def close(self) -> None:
        """Ends what the services keep."""
        for service in self.services.values():
            service.close()


def _shaped(shape: Callable[[Any], Any], handle: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A handle whose results are given another shape, one by one."""

    def shaped(data: Any, context: Any) -> Any:
        results = handle(data, context)
        return later(results) if inspect.iscoroutine(results) else all_of(results)

    async def later(results: Any) -> Any:
        return all_of(await results)

    def all_of(results: Any) -> Any:
        return [shape(each) for each in results] if isinstance(results, list) else results

    return shaped


def _yes_or_no(result: Any) -> bytes:
    return b"1" if result else b"0"


def _packed(result: Any) -> bytes:
    """A list as the owner of the slot finds its elements: their number, the bytes of each, then they themselves.

    Raises:
        TypeError: it is no list, or an element cannot be sent.
    """
    if not isinstance(result, list):
        raise TypeError(f"a node with `scatter` has to answer with a list, not {type(result).__name__}")
    parts = []
    for each in result:
        part = encode(each)
        if part is None:
            raise TypeError(f"an element of the list to scatter is a {type(each).__name__}, which cannot be sent")
        parts.append(part)
    lengths = [len(part) for part in parts]
    return struct.pack(f"<{len(parts) + 1}I", len(parts), *lengths) + b"".join(parts)


_SHAPES = {FunctionKind.WHEN: partial(_shaped, _yes_or_no), FunctionKind.SCATTER: partial(_shaped, _packed)}
