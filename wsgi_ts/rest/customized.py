"""`GET /models/{model}?customized=true`: a describe answer that the model's handler adds to.

The question goes to a model worker like a prediction, so this module brings the data plane with it. The process of the
management API has none until the first such request: import this module then, and not before.
"""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wsgi_ts.batcher.shm.layout import WORKER_DIED, RequestFlag
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.plane import BlockingPlane, DataPlane, Ticket
from wsgi_ts.errors import InternalServerError, OutOfResources, RequestTimeout, ServerError, ServiceUnavailable

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

#: Describe requests under way at a time: more than the management API has threads.
_SLOTS = 64
#: The head of a request that came without one, over gRPC.
NO_HEAD = b"GET / HTTP/1.1\r\n\r\n"
#: TorchServe's text, spelling included.
_FAILED = "Failed to get customized model matadata."


class HandlerDescriptions:
    """Asks handlers to describe their models; any thread may."""

    def __init__(self, instance: Instance) -> None:
        """Takes no memory yet.

        Args:
            instance: the instance.
        """
        self._instance = instance
        self._lock = threading.Lock()
        self._planes: tuple[DataPlane, BlockingPlane] | None = None

    def ask(
        self, model: str, version: str, limit_s: float, head: bytes = NO_HEAD, request_id: str | None = None
    ) -> dict[str, Any] | None:
        """What the handler says of its model.

        Args:
            model: the model's name.
            version: one of its versions.
            limit_s: seconds to wait for the answer.
            head: the request's head: the handler is called with an empty row, these headers, and `describe`.
            request_id: the id of the request; None for a new one.

        Returns:
            The object it returned, {} for something else, None for nothing at all.

        Raises:
            ServiceUnavailable: the version has no worker, or its queue is full.
            InternalServerError: no answer in time, or the handler failed.
            OutOfResources: /dev/shm is full.
            ServerError: what else the data path says.
        """
        plane, blocking = self._open()
        plane.routes.refresh()
        target = plane.routes.version_target(model, version, flags=RequestFlag.DESCRIBE)
        ticket = blocking.predict(target, request_id or str(uuid.uuid4()), head, b"", b"", limit_s)
        if ticket.error is not None:
            raise _described(ticket.error, model)
        return _read(ticket)

    def _open(self) -> tuple[DataPlane, BlockingPlane]:
        with self._lock:
            if self._planes is None:
                instance = self._instance
                config = replace(instance.config, slots_per_worker=_SLOTS)
                try:
                    plane = DataPlane(config, instance.run_dir, instance.prefix)
                except SharedMemoryFull as full:
                    raise OutOfResources("Not enough shared memory for the request") from full
                self._planes = plane, BlockingPlane(plane)
            return self._planes


def _described(error: ServerError, model: str) -> ServerError:
    """The error of the data path in the words of a describe request."""
    if isinstance(error, ServiceUnavailable):
        return ServiceUnavailable(
            f'Model "{model}" has no worker to serve describe request. Please use scale workers API to add workers.'
        )
    if isinstance(error, RequestTimeout) or error.message == WORKER_DIED:
        return InternalServerError(_FAILED)
    return error


def _read(ticket: Ticket) -> dict[str, Any] | None:
    body = b"".join(ticket.stream) if ticket.stream is not None else bytes(ticket.body)
    if not body:
        return None
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}
