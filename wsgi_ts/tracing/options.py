"""Which traces are kept and exported, as the processes that make records of requests and batches are told it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What of the configuration is about traces.

    Attributes:
        kept_at: the socket at which the supervisor takes records of slow and failed requests and batches; empty: none
            are kept.
        exported_at: the socket at which the exporter takes those of sampled ones; empty: there are no spans.
        keep: of each model so many of the slowest in a minute are kept.
        slow_ms: what takes longer is kept in any case; 0: no limit.
        ratio: the share of traces begun here that are sampled.
    """

    kept_at: str
    exported_at: str
    keep: int
    slow_ms: int
    ratio: float

    @classmethod
    def of(cls, config: Config, run_dir: str | os.PathLike[str]) -> TraceOptions:
        """Returns those of an instance."""
        files = RunFiles(Path(run_dir))
        exported_at = str(files.spans_socket) if config.otlp_endpoint else ""
        kept_at = str(files.traces_socket) if config.keeps_traces else ""
        return cls(kept_at, exported_at, config.trace_keep, config.trace_slow_ms, config.trace_sample_ratio)

    @classmethod
    def from_dict(cls, fields: dict[str, Any] | None) -> TraceOptions | None:
        """Returns what `to_dict` has returned; None for None."""
        return None if fields is None else cls(**fields)

    @property
    def is_on(self) -> bool:
        """Whether there is something to keep or to export."""
        return bool(self.kept_at or self.exported_at)

    def to_dict(self) -> dict[str, Any] | None:
        """Returns it for a message; None where there is nothing to keep and nothing to export."""
        return dataclasses.asdict(self) if self.is_on else None
