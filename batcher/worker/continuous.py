"""The requests of a continuous batch, as the model worker holds them between two steps.

A step is one call of the handler with all requests under way. A request that goes on comes back in the next step as an
empty row, with its id and its headers; one that has ended makes room for another.
"""

from __future__ import annotations

from wsgi_ts.batcher.worker.slots import SlotReference
from wsgi_ts.handlers.serving.context import STREAM_NEXT
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.results import Answer


class UnderWay:
    """What a continuous batch consists of, in the order in which it came.

    Attributes:
        refs: where the requests lie.
        requests: what the handler gets in the next step, in the same order.
    """

    def __init__(self) -> None:
        self.refs: list[SlotReference] = []
        self.requests: list[Request] = []
        self._staying: set[int] = set()

    def join(self, ref: SlotReference, request: Request) -> None:
        """Adds a new request."""
        self.refs.append(ref)
        self.requests.append(request)

    def drop_gone(self) -> list[SlotReference]:
        """Removes and returns the requests whose client has gone."""
        gone = [ref for ref in self.refs if ref.is_cancelled]
        if gone:
            self._keep({ref.entry for ref in self.refs} - {ref.entry for ref in gone})
        return gone

    def stay(self, ref: SlotReference) -> None:
        """Notes in a step that this request has not ended with it."""
        self._staying.add(ref.entry)

    def end_step(self) -> int:
        """Removes the requests that have ended with the step; returns how many there were."""
        count = len(self.refs)
        self._keep(self._staying)
        self._staying = set()
        for request in self.requests:
            request.row = {}
        return count - len(self.refs)

    def _keep(self, entries: set[int]) -> None:
        kept = [(ref, request) for ref, request in zip(self.refs, self.requests, strict=True) if ref.entry in entries]
        self.refs = [ref for ref, _ in kept]
        self.requests = [request for _, request in kept]


def is_part(answer: Answer) -> bool:
    """Whether another part of this answer is to follow: the handler, or its stopping criterion, has set the header."""
    return not answer.error and any(value == "true" and name.lower() == STREAM_NEXT for name, value in answer.headers)


def ended_sequences(answers: list[Answer], header: str) -> list[str]:
    """The sequences that the handler ends: any answer may name some, `id1;id2`, in this header."""
    return [
        key.strip()
        for answer in answers
        for name, value in answer.headers
        if name.lower() == header.lower()
        for key in value.split(";")
        if key.strip()
    ]
