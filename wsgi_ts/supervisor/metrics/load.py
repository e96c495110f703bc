"""Gauges for those who decide how many servers there should be: queue, work under way, capacity, offered load.

What is a rate is taken over the time since an earlier look, one of ten seconds or more ago where there is one: whoever
scrapes sets the pace, and several may.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.layout import ModelWord
from wsgi_ts.metrics.exposition import Family
from wsgi_ts.metrics.specification import GAUGE
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.supervisor.metrics.board import MODEL_LABELS, ModelCounts

#: Rates are over this time at least, in seconds, once the server has been looked at for so long.
WINDOW_S = 10.0
#: Looks that are kept; who scrapes more often than ten times a second gets rates over a shorter time.
_LOOKS = 100

_KV_CACHE = "ts_kv_cache_usage_ratio"
_HELP = {
    "ts_queue_depth": "Requests that wait for a model worker",
    "ts_running_requests": "Requests that model workers have",
    "ts_queue_wait_seconds": "How long the request has waited that waits longest, in seconds",
    "ts_worker_busy_ratio": "Part of their time that the ready model workers were busy, 0 to 1",
    "ts_capacity_rps": "Requests a second that the ready model workers can do at the batch sizes they had last",
    "ts_desired_replicas_hint": "Requests a second that came, in parts of ts_capacity_rps; summed over all servers: "
    "how many of them the load takes",
    _KV_CACHE: "How full the KV caches of the model workers are whose handlers tell it, 0 to 1",
}
#: Their names.
METRICS = frozenset(_HELP)
#: What vLLM calls the first two, and the last.
_VLLM = {"vllm:num_requests_waiting": "ts_queue_depth", "vllm:num_requests_running": "ts_running_requests"}
_VLLM_KV_CACHE = "vllm:kv_cache_usage_perc"


@dataclass(frozen=True, slots=True)
class _Look:
    """What had been counted of one model version at a time."""

    at: float
    arrived: int
    answered: int
    service_s: float


class LoadGauges:
    """The gauges of one instance, three of them with `vllm_names` under vLLM's names, too; used from any thread."""

    def __init__(self, *, vllm_names: bool) -> None:
        self._vllm_names = vllm_names
        self._lock = threading.Lock()
        # By number and name: a number may get another model, whose counts begin anew.
        self._looks: dict[tuple[int, str, str], deque[_Look]] = {}
        self._capacity: dict[tuple[int, str, str], float] = {}

    def families(self, models: Sequence[ModelCounts]) -> list[Family]:
        """Looks at the models, and returns the gauges."""
        found = {name: Family(name, GAUGE, text, MODEL_LABELS) for name, text in _HELP.items()}
        with self._lock:
            known = {(model.model.spec.index, *model.labels) for model in models}
            for gone in self._looks.keys() - known:
                del self._looks[gone]
                self._capacity.pop(gone, None)
            for model in models:
                for name, value in self._values(model).items():
                    found[name].samples[model.labels] = value
        families = list(found.values())
        if self._vllm_names:
            families += [self._by_model(name, found[ours]) for name, ours in _VLLM.items()]
            families.append(self._kv_cache_by_model(models))
        return families

    @staticmethod
    def _by_model(name: str, family: Family) -> Family:
        """A gauge under a name of vLLM's, which has no versions: their sum."""
        by_model = Family(name, GAUGE, family.help, ("model_name",))
        for (model, _), value in family.samples.items():
            before = by_model.samples.get((model,), 0)
            by_model.samples[(model,)] = float(before) + float(value)  # type: ignore[arg-type]
        return by_model

    @staticmethod
    def _kv_cache_by_model(models: Sequence[ModelCounts]) -> Family:
        """How full the KV caches are of all versions of a model together."""
        told: dict[str, list[tuple[int, int]]] = {}
        for model in models:
            told.setdefault(model.labels[0], []).append(_kv_caches(model.words))
        family = Family(_VLLM_KV_CACHE, GAUGE, _HELP[_KV_CACHE], ("model_name",))
        for name, versions in told.items():
            used, room = map(sum, zip(*versions, strict=True))
            if room:
                family.samples[(name,)] = used / room
        return family

    def _values(self, model: ModelCounts) -> dict[str, float]:
        """The gauges of one model version, now."""
        now, words = time.monotonic(), model.words
        queued, ready = words[ModelWord.QUEUED], words[ModelWord.READY_WORKERS]
        running = max(0, words[ModelWord.OUTSTANDING] - queued)
        look = _Look(
            now,
            words[ModelWord.REQUESTS] + words[ModelWord.REQUESTS_NAMED],
            sum(words[ModelWord.LATENCY_BUCKETS : ModelWord.LATENCY_BUCKETS + len(layout.TIME_BUCKETS_US) + 1]),
            words[ModelWord.SERVICE_US] / 1e6,
        )
        key = (model.model.spec.index, *model.labels)
        looks = self._looks.setdefault(key, deque(maxlen=_LOOKS))
        before = next((each for each in reversed(looks) if now - each.at >= WINDOW_S), looks[0] if looks else None)
        looks.append(look)
        oldest_ns = words[ModelWord.OLDEST_NS]
        values = {
            "ts_queue_depth": queued,
            "ts_running_requests": running,
            "ts_queue_wait_seconds": max(0.0, now - oldest_ns / 1e9) if oldest_ns else 0.0,
        }
        used, room = _kv_caches(words)
        if room:
            values[_KV_CACHE] = used / room
        if before is None or now == before.at:
            return values
        elapsed_s = now - before.at
        answered, service_s = look.answered - before.answered, look.service_s - before.service_s
        if answered > 0 and service_s > 0 and ready:
            self._capacity[key] = ready * answered / service_s
        # Work that takes longer than the time looked at is not counted yet.
        busy = service_s / elapsed_s if answered else min(running, ready)
        values["ts_worker_busy_ratio"] = min(1.0, busy / ready) if ready else 0.0
        capacity = self._capacity.get(key)
        if capacity is not None:
            values["ts_capacity_rps"] = capacity
            values["ts_desired_replicas_hint"] = (look.arrived - before.arrived) / elapsed_s / capacity
        return values


def _kv_caches(words: Sequence[int]) -> tuple[int, int]:
    """How much is in use of the KV caches of a model version's workers, and how much they hold; 0 where none tells it.

    Together, since a request may go to any worker: one that is full by itself turns nobody away.
    """
    return words[ModelWord.KV_CACHE], words[ModelWord.KV_CACHE_WORKERS] * layout.KV_CACHE_FULL
