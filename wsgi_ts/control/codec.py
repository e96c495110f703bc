"""How messages stand in frames: JSON.

A frame holds one message: the name of its class, in lower case with underscores, under `op` where it goes down (from
the supervisor to a batcher, from a batcher to its template) and under `event` where it comes up; its fields stand
beside the name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast, get_args

from wsgi_ts.messages import (
    FromBatcher,
    FromTemplate,
    FromWorker,
    ModelSpec,
    ToBatcher,
    ToTemplate,
    WantedWorker,
    WorkerState,
)

Message = TypeVar("Message")
#: Fields that are more than JSON.
_READERS: dict[str, Callable[[Any], Any]] = {
    "spec": lambda fields: ModelSpec(**fields),
    "state": WorkerState,
    "workers": lambda rows: [WantedWorker(**row) for row in rows],
}


class UnknownMessage(ValueError):
    """A frame holds no message that its receiver knows: the sender is of another version."""


class Messages(Generic[Message]):
    """What one party may say to another, and how it stands in a frame.

    Args:
        key: the field with the message's name, `op` or `event`.
        kinds: the union of the messages' classes.
    """

    def __init__(self, key: str, kinds: object) -> None:
        self._key = key
        self._kinds = {_name(kind): kind for kind in get_args(kinds)}

    def encode(self, message: Message) -> dict[str, Any]:
        """The frame that holds a message."""
        fields = {each.name: getattr(message, each.name) for each in dataclasses.fields(cast("Any", message))}
        return {self._key: _name(type(message)), **{name: _plain(value) for name, value in fields.items()}}

    def decode(self, frame: Mapping[str, Any]) -> Message:
        """The message in a frame; raises UnknownMessage where there is none such, or its fields are others."""
        fields = dict(frame)
        name = fields.pop(self._key, None)
        try:
            for field_name in fields.keys() & _READERS.keys():
                fields[field_name] = _READERS[field_name](fields[field_name])
            message: Message = self._kinds[name](**fields)
        except (KeyError, TypeError, ValueError) as error:
            kind = "operation" if self._key == "op" else "event"
            raise UnknownMessage(f"Unknown {kind} {name!r}") from error
        return message


def _name(kind: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _plain(value: Any) -> Any:
    if isinstance(value, ModelSpec):
        return dataclasses.asdict(value)
    if isinstance(value, list):
        return [dataclasses.asdict(each) if isinstance(each, WantedWorker) else each for each in value]
    return value


TO_BATCHER: Messages[ToBatcher] = Messages("op", ToBatcher)
TO_TEMPLATE: Messages[ToTemplate] = Messages("op", ToTemplate)
FROM_TEMPLATE: Messages[FromTemplate] = Messages("event", FromTemplate)
FROM_WORKER: Messages[FromWorker] = Messages("event", FromWorker)
FROM_BATCHER: Messages[FromBatcher] = Messages("event", FromBatcher)
