"""Values that go from rank to rank: their form as JSON, their tensors as they are. Nothing is pickled.

A form is a list: `["t", dtype, shape]` a tensor, `["v", x]` a plain value, `["l", …]` a list, `["u", …]` a tuple,
`["d", {…}]` a dict, `["o", {…}]` the output object of a model, `["e", text]` a failure, `["c", null]` the place of a
cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from wsgi_ts.handlers.toolkit.library_names import CACHE_NAMES

#: Contents of tensors up to this size travel together with their form.
TOLD_BYTES = 32768
#: Length of the message that a value begins with: 4 bytes of length, then what `to_bytes` makes, as far as it fits.
#: A second message would cost more than sending this many bytes for nothing.
HEAD_BYTES = 16384
_LENGTH_BYTES = 4


class Output(dict[str, Any]):
    """The output object of a model that ran on another rank: by name, by attribute, or by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's output has no {name}, only {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __missing__(self, key: str) -> Any:
        """Returns the cache, by the name that it has in another version of transformers."""
        if key in CACHE_NAMES:
            for name in CACHE_NAMES:
                if name in self:
                    return self[name]
        raise KeyError(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values without the names."""
        return tuple(self.values())


@dataclass(frozen=True)
class CachePlace:
    """Takes the place of a key-value cache, which stays where it is: each stage keeps those of its own layers."""


@dataclass(frozen=True)
class Failure:
    """Takes the place of a value that could not be computed."""

    text: str


def pack(value: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """Takes a value apart into its form and its tensors.

    Raises:
        TypeError: there is something in it that does not travel.
    """
    tensors: list[torch.Tensor] = []
    return _form(value, tensors), tensors


def _form(value: Any, tensors: list[torch.Tensor]) -> list[Any]:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ["t", str(value.dtype).removeprefix("torch."), list(value.shape)]
    if value is None or isinstance(value, bool | int | float | str):
        return ["v", value]
    if isinstance(value, list | tuple):
        return ["l" if isinstance(value, list) else "u", [_form(item, tensors) for item in value]]
    if isinstance(value, Mapping):
        return ["d" if type(value) is dict else "o", {str(key): _form(item, tensors) for key, item in value.items()}]
    if isinstance(value, Failure):
        return ["e", value.text]
    if isinstance(value, CachePlace):
        return ["c", None]
    raise TypeError(
        f"a {type(value).__name__} cannot go from one process of the model to another: only tensors can, "
        "numbers, texts, and lists, tuples and dicts of them"
    )


def unpack(form: list[Any], tensors: Iterator[torch.Tensor]) -> Any:
    """Puts a value together again."""
    kind, content = form[0], form[1]
    if kind == "t":
        return next(tensors)
    if kind in "lu":
        items = [unpack(item, tensors) for item in content]
        return items if kind == "l" else tuple(items)
    if kind in "do":
        fields = {name: unpack(item, tensors) for name, item in content.items()}
        return fields if kind == "d" else Output(fields)
    if kind == "c":
        return CachePlace()
    return Failure(content) if kind == "e" else content


def empty_tensors(form: list[Any], device: torch.device | str) -> list[torch.Tensor]:
    """Room for the tensors of a form, in their order."""
    kind, content = form[0], form[1]
    if kind == "t":
        # Ordinary tensors, also in inference mode: a layer may change its input in place.
        with torch.inference_mode(False):
            return [torch.empty(form[2], dtype=getattr(torch, content), device=device)]
    if kind in "ludo":
        items = content.values() if isinstance(content, dict) else content
        return [tensor for item in items for tensor in empty_tensors(item, device)]
    return []


def size_of(tensors: list[torch.Tensor]) -> int:
    """Returns the bytes of the tensors' contents."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def to_bytes(form: list[Any], tensors: list[torch.Tensor]) -> bytes:
    """Returns a value as bytes: length of the form, form, contents of the tensors if there are any."""
    text = json.dumps(form).encode()
    contents = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *(content.tobytes() for content in contents)])


def form_of(message: bytes | bytearray) -> tuple[list[Any], bytes | bytearray]:
    """Returns the form that `to_bytes` wrote, and the bytes behind it."""
    end = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "little")
    return json.loads(message[_LENGTH_BYTES:end]), message[end:]


def tensors_from(form: list[Any], contents: bytes | bytearray, device: torch.device) -> list[torch.Tensor]:
    """Returns the tensors that `to_bytes` wrote behind the form."""
    tensors, start = empty_tensors(form, "cpu"), 0
    for tensor in tensors:
        size = size_of([tensor])
        if size:
            content = torch.frombuffer(bytearray(contents[start : start + size]), dtype=torch.uint8)
            tensor.view(-1).view(torch.uint8).copy_(content)
        start += size
    return [tensor.to(device) for tensor in tensors]


class Link:
    """Sends values to other ranks and receives theirs.

    Args:
        group: the process group, None for a rank alone; its ranks are named by their global numbers.
        device: where tensors are, and where received ones go.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._under_way: list[tuple[Any, torch.Tensor]] = []

    def send(self, value: Any, to: int) -> None:
        """Begins to send a value; it has left when `finish` returns."""
        form, tensors = pack(value)
        # What lies on a GPU goes from there to the next one.
        told = self._device.type == "cpu" and size_of(tensors) <= TOLD_BYTES
        message = to_bytes(form, tensors if told else [])
        message = len(message).to_bytes(_LENGTH_BYTES, "little") + message
        self._begin(_as_tensor(message[:HEAD_BYTES].ljust(HEAD_BYTES)), to)
        if len(message) > HEAD_BYTES:
            self._begin(_as_tensor(message[HEAD_BYTES:]), to)
        for tensor in () if told else tensors:
            if tensor.numel():
                self._begin(tensor.detach().to(self._device).contiguous(), to)

    def finish(self) -> None:
        """Waits until all that was sent has left."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def receive(self, source: int) -> Any:
        """Receives the next value from a rank."""
        head = bytearray(HEAD_BYTES)
        self._fill(torch.frombuffer(head, dtype=torch.uint8), source)
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        message = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(message) < length:
            rest = bytearray(length - len(message))
            self._fill(torch.frombuffer(rest, dtype=torch.uint8), source)
            message += rest
        form, contents = form_of(message)
        if contents:
            return unpack(form, iter(tensors_from(form, contents, self._device)))
        tensors = empty_tensors(form, self._device)
        for tensor in tensors:
            if tensor.numel():
                self._fill(tensor, source)
        return unpack(form, iter(tensors))

    def broadcast(self, tensors: list[torch.Tensor], source: int) -> None:
        """Copies tensors of one rank into those of all others; every rank of the group calls it."""
        for tensor in tensors:
            if tensor.numel():
                dist.broadcast(tensor, source, group=self._group)

    def _begin(self, tensor: torch.Tensor, to: int) -> None:
        # The tensor is kept: it must not be reused before it has left.
        self._under_way.append((dist.isend(tensor, to, group=self._group), tensor))

    def _fill(self, tensor: torch.Tensor, source: int) -> None:
        dist.recv(tensor, source, group=self._group)


def _as_tensor(message: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)
