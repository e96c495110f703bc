"""Settings of the engine."""

from dataclasses import dataclass


@dataclass
class KvCacheConfig:
    """The cache of keys and values."""

    free_gpu_memory_fraction: float = 0.9
