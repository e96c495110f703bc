"""Key-value caches of a model in stages: each stage keeps those of its own layers, callers hold a handle.

A cache is known by what it is, not by the name under which a model takes or returns it: transformers has renamed that.
Where a value with a cache in it travels, a `CachePlace` goes in the cache's stead, and at the end of the way what is
there of the cache takes its place again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
        number: the generation's number.
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
    """The handle of a generation.

    Args:
        number: the generation's number.
        config: that of the model, from which newer versions of transformers know what its layers need; None for none.

    Raises:
        ImportError: transformers is missing, or has no such cache.
    """
    dynamic_cache: Any = DYNAMIC_CACHE.load(_PURPOSE)
    handle_type: Any = type("PipelineCache", (PipelineCache, dynamic_cache), {})
    takes_config = config is not None and "config" in inspect.signature(dynamic_cache).parameters
    handle: PipelineCache = handle_type(config=config) if takes_config else handle_type()
    handle.number = number
    return handle


def cache_parameter(model: nn.Module) -> str:
    """The name under which a model's `forward` takes its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


def new_stage_cache(first_layer: int) -> Any:
    """A key-value cache of transformers for the layers of one stage, which count from `first_layer`.

    Raises:
        ImportError: transformers is missing, or has no such cache.
    """
    dynamic_cache: Any = DYNAMIC_CACHE.load(_PURPOSE)

    class StageCache(dynamic_cache):  # type: ignore[misc]
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return super().update(key_states, value_states, layer_idx - first_layer, *args, **kwargs)

    return StageCache()


def put_in_place(value: Any, is_meant: Callable[[Any], bool], new: Any) -> Any:
    """A value with parts of it replaced, at any place in lists, tuples and mappings.

    Args:
        value: what a layer or a model returned.
        is_meant: says whether a part is to be replaced.
        new: takes its place.

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
