"""Key-value caches of a model in stages: each stage keeps those of its own layers, callers hold a handle.

A cache is known by what it is, not by the name under which a model takes or returns it: transformers has renamed that.
Where a value with a cache in it travels, a `CachePlace` goes in the cache's stead, and at the end of the way what is
there of the cache takes its place again.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from wsgi_ts.handlers.distributed.transfer import Output
from wsgi_ts.handlers.toolkit.library_names import CACHE_NAMES, DYNAMIC_CACHE

#: Who needs transformers, for messages.
_PURPOSE = "A model in stages that keeps keys and values"


class PipelineCache:
    """Stands for the key-value caches that the stages keep of one generation: what the model's cache is here.

    `new_handle` makes one that is a cache of transformers besides, without keys and values: `generate` looks at more
    and more of what it is given.

    Attributes:
        tokens: how many tokens of each row it knows.
    """

    #: For transformers, which would compile the loop around caches that can be.
    is_compileable = False

    number = 0
    tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The same, as transformers asks for it."""
        return self.tokens

    def reorder_cache(self, beam_idx: Any) -> None:
        """Refuses what beam search asks for.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the cache cannot be reordered, which this way to choose tokens (beam search) needs: its parts are on all "
            "stages. Call generate with use_cache=False"
        )


def new_handle(number: int, config: Any) -> PipelineCache:
    """Returns the handle of a generation.

    From the model's `config` newer versions of transformers know what its layers need; None for none.

    Raises:
        ImportError: transformers is missing, or has no such cache.
    """
    dynamic_cache: Any = DYNAMIC_CACHE.load(_PURPOSE)
    handle_type: Any = type("PipelineCache", (PipelineCache, dynamic_cache), {})
    takes_config = config is not None and "config" in inspect.signature(dynamic_cache).parameters
    handle: PipelineCache = handle_type(config=config) if takes_config else handle_type()
    handle.number = number
    return handle


class StageCaches:
    """The key-value caches of one stage's layers, by generation, and the handles by which callers know them.

    Attributes:
        name: the name under which the model's `forward` takes its cache.
    """

    def __init__(self, model: nn.Module, first_layer: int) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.name = next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])
        self._config = getattr(model, "config", None)
        # A model of transformers that would return its caches unless told not to.
        self._has_cache = hasattr(self._config, "use_cache")
        self._first_layer = first_layer
        self._numbers = itertools.count()
        self._caches: dict[int, list[Any]] = {}
        self._freed: deque[int] = deque()

    def handle_for(self, named: dict[str, Any]) -> PipelineCache | None:
        """Returns the handle of the caches that a call uses, a new one for a generation that begins. Completes `named`.

        Raises:
            TypeError, ImportError: as `take_handle` and `new_handle` do.
        """
        given = self.take_handle(named)
        if self._has_cache:
            named.setdefault("use_cache", given is not None)
        if given is None and named.get("use_cache"):
            return self.new_handle()
        return given

    def take_handle(self, named: dict[str, Any]) -> PipelineCache | None:
        """Takes the handle of a cache out of named arguments, whatever its name.

        Raises:
            TypeError: there is a cache that is no handle.
        """
        # Another model than those of transformers may well have a `cache` that is something else.
        names = CACHE_NAMES if self._has_cache else CACHE_NAMES[:1]
        for name, value in list(named.items()):
            if isinstance(value, PipelineCache):
                del named[name]
                return value
            if name in names:
                if value is not None:
                    raise TypeError(f"{name} must be what an earlier call of this driver has returned as such")
                del named[name]
        return None

    def new_handle(self) -> PipelineCache:
        """Returns the handle of a generation that begins.

        Raises:
            ImportError: transformers is missing, or has no such cache.
        """
        handle = new_handle(next(self._numbers), self._config if hasattr(self._config, "get_text_config") else None)
        # When nobody holds it any more, the next call tells all ranks.
        weakref.finalize(handle, self._freed.append, handle.number)
        return handle

    def take_freed(self) -> list[int]:
        """Returns the numbers of generations whose handles nobody holds any more, each of them once."""
        return [self._freed.popleft() for _ in range(len(self._freed))]

    def drop(self, numbers: Sequence[int]) -> None:
        """Forgets the caches of generations."""
        for number in numbers:
            self._caches.pop(number, None)

    def of(self, number: int | None, pieces: int) -> list[Any]:
        """Returns the caches of a generation, one per micro-batch, made when first asked for; None each without one."""
        if number is None:
            return [None] * pieces
        if number not in self._caches:
            self._caches[number] = [self._new_cache() for _ in range(pieces)]
        return self._caches[number]

    def _new_cache(self) -> Any:
        """Returns a cache of transformers whose layers count from the stage's first one."""
        dynamic_cache: Any = DYNAMIC_CACHE.load(_PURPOSE)
        first_layer = self._first_layer

        class StageCache(dynamic_cache):  # type: ignore[misc]
            def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
                return super().update(key_states, value_states, layer_idx - first_layer, *args, **kwargs)

        return StageCache()


def put_in_place(value: Any, is_meant: Callable[[Any], bool], new: Any) -> Any:
    """Returns a value with `new` for each part that is meant, at any place in lists, tuples and mappings.

    Returns:
        The value; a model's output object as an `Output`.
    """
    if is_meant(value):
        return new
    if isinstance(value, list | tuple):
        items = [put_in_place(item, is_meant, new) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        fields = {name: put_in_place(item, is_meant, new) for name, item in value.items()}
        return fields if type(value) is dict else Output(fields)
    return value
