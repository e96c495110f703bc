"""What handlers say of their models: `GET /models/{model}?customized=true`, and DescribeModel over gRPC.

The question goes to a model worker like a prediction, so this module brings the data plane with it. The process of the
management API has none until the first such request: import this module then, and not before.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from wsgi_ts.batcher.shm.layout import WORKER_DIED, RequestFlag
from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.dataplane.blocking import BlockingPlane
from wsgi_ts.errors import InternalServerError, RequestTimeout, ServerError, ServiceUnavailable
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
        self._plane = BlockingPlane(instance, _SLOTS)

    def ask(
        self, model: str, version: str, limit_s: float, head: bytes = NO_HEAD, request_id: str | None = None
    ) -> dict[str, Any] | None:
        """Returns what the handler says of its model.

        It is called with an empty row, the headers of `head`, and `describe`; `limit_s` are the seconds to wait for its
        answer.

        Returns:
            The object it returned, {} for something else, None for nothing at all.

        Raises:
            ServiceUnavailable: the version has no worker, or its queue is full.
            InternalServerError: no answer in time, or the handler failed.
            OutOfResources: /dev/shm is full.
            ServerError: what else the data path says.
        """
        target = self._plane.routes.version_target(model, version, flags=RequestFlag.DESCRIBE)
        answer = self._plane.predict(target, request_id or str(uuid.uuid4()), head, b"", b"", limit_s)
        if answer.error is not None:
            raise _described(answer.error, model)
        return _read(answer)


def _described(error: ServerError, model: str) -> ServerError:
    """Returns an error of the data path in the words of a describe request."""
    if isinstance(error, ServiceUnavailable):
        return ServiceUnavailable(
            f'Model "{model}" has no worker to serve describe request. Please use scale workers API to add workers.'
        )
    if isinstance(error, RequestTimeout) or error.message == WORKER_DIED:
        return InternalServerError(_FAILED)
    return error


def _read(answer: Answer) -> dict[str, Any] | None:
    body = BlockingPlane.body_of(answer)
    if not body:
        return None
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
