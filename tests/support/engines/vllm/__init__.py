"""Stand-in for vLLM: what `wsgi_ts.handlers.bundled.vllm` uses of version 0.33, under the same names."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

from letters import LetterModel
from prometheus_client import REGISTRY, Gauge

__version__ = "0.33.0"


class AsyncEngineArgs:
    """The engine's arguments."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    @classmethod
    def from_cli_args(cls, arguments: argparse.Namespace) -> AsyncEngineArgs:
        """Takes them from a parsed command line."""
        return cls(arguments)


class AsyncLLMEngine:
    """The engine; `running` and `aborted` count generations; `kv_cache_usage` keeps what the last one has used."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = LetterModel().eval()
        self.model_config = SimpleNamespace(max_model_len=arguments.max_model_len)
        self.vllm_config = SimpleNamespace(model_config=self.model_config)
        self.errored = False
        self.running = self.aborted = 0
        # As vLLM does it: the last engine of a process has the metrics.
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "").startswith("vllm"):
                REGISTRY.unregister(collector)
        gauge = Gauge(
            "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", ["model_name", "engine"]
        )
        self.kv_cache_usage = gauge.labels(arguments.served_model_name[0], "0")

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> AsyncLLMEngine:
        """Starts an engine."""
        return cls(engine_args.arguments)

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        """What it can do."""
        return ("generate",)
