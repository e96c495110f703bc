"""What the console shows, as one JSON text a second: counts since the start, and what everything is at the moment.

Rates, shares and percentiles are the page's business: it has two snapshots, and knows what its reader wants to see.
Nothing here runs while nobody looks.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import ModelWord, WebWord, WorkflowWord
from wsgi_ts.cgroup import usable_cores
from wsgi_ts.checks import machine
from wsgi_ts.gpu.devices import gpu_details
from wsgi_ts.messages import WorkerState
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion, WorkerRecord
from wsgi_ts.process import resident_bytes
from wsgi_ts.settings.config import Config, property_settings
from wsgi_ts.workflows.layout import lay_out

#: How often the GPUs are looked at while somebody looks at the console, in seconds; it takes a process.
GPU_INTERVAL_S = 5.0
#: How often the memory of processes is read: there may be hundreds of them.
MEMORY_INTERVAL_S = 5.0
#: What is shown in place of a value that is a secret, and the parts of the names of such keys.
HIDDEN = "••••••"
_SECRET = ("pass", "secret", "credential", "otlp_headers")
_TIMES = len(layout.TIME_BUCKETS_US) + 1
_SIZES = len(layout.BATCH_SIZES) + 1
#: Numbers of a model version by the page's names.
_COUNTS = {
    "batches": ModelWord.BATCHES,
    "service_us": ModelWord.SERVICE_US,
    "handover_us": ModelWord.HANDOVER_US,
    "failed": ModelWord.FAILED,
    "cancelled": ModelWord.CANCELLED,
    "expired": ModelWord.EXPIRED,
    "refused": ModelWord.REFUSED,
    "queued": ModelWord.QUEUED,
    "outstanding": ModelWord.OUTSTANDING,
}
#: Those that are the sum of two words.
_SUMS = {
    "requests": (ModelWord.REQUESTS, ModelWord.REQUESTS_NAMED),
    "latency_us": (ModelWord.LATENCY_US, ModelWord.LATENCY_US_NAMED),
    "queue_us": (ModelWord.QUEUE_US, ModelWord.QUEUE_US_NAMED),
}
#: Histograms: first word and number of buckets.
_BUCKETS = {
    "latency": (ModelWord.LATENCY_BUCKETS, _TIMES),
    "queue": (ModelWord.QUEUE_BUCKETS, _TIMES),
    "service": (ModelWord.SERVICE_BUCKETS, _TIMES),
    "batch": (ModelWord.BATCH_BUCKETS, _SIZES),
    "service_by_size_us": (ModelWord.SERVICE_BY_SIZE, _SIZES),
    "requests_by_size": (ModelWord.REQUESTS_BY_SIZE, _SIZES),
}
_RESPONSES = {"2xx": WebWord.RESPONSES_2XX, "4xx": WebWord.RESPONSES_4XX, "5xx": WebWord.RESPONSES_5XX}


class ConsoleData:
    """The console's view of one instance; used from any thread.

    Args:
        board: what is counted.
        batchers: how many batchers there are.
        status: what `wsgi-ts status` shows.
    """

    def __init__(
        self, config: Config, board: Board, registry: Registry, batchers: int, status: Callable[[], dict[str, Any]]
    ) -> None:
        self._config = config
        self._board = board
        self._registry = registry
        self._batchers = batchers
        self._status = status
        self._hostname = socket.gethostname()
        self._gpus = _Gpus(batchers - 1)
        self._memory = _Memory()
        #: The drawings of the workflows by name, each with the graph that it is of.
        self._drawings: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {}

    def snapshot(self) -> str:
        """Everything that may change, as JSON in one line."""
        self._memory.begin()
        status = self._status()
        for table in ("models", "workers", "segments"):
            status.pop(table)
        for process in status["processes"]:
            process["memory"] = self._memory.of(process.get("pid") or -1)
        server = {
            **status,
            "hostname": self._hostname,
            "cores": usable_cores(),
            "model_api": self._config.enable_model_api,
            "combined": self._config.is_combined,
            "tokens": self._config.token_authorization,
        }
        data = {
            "at": time.time(),
            "server": server,
            "answers": {name: self._answers(word) for name, word in _RESPONSES.items()},
            "time_bounds_us": layout.TIME_BUCKETS_US,
            "batch_bounds": layout.BATCH_SIZES,
            "models": list(self._models()),
            "workflows": [self._workflow(name, graph) for name, graph in self._registry.workflows.graphs().items()],
            "gpus": self._gpus.latest(),
        }
        return json.dumps(data, separators=(",", ":"))

    def settings(self) -> dict[str, Any]:
        """The settings, each with its default and where its value comes from, and what the doctor would say now."""
        rows = []
        for name, row in property_settings().items():
            value, default = getattr(self._config, name), row.default
            is_secret = value is not None and any(part in name for part in _SECRET)
            rows.append(
                {
                    "key": name,
                    "value": HIDDEN if is_secret and value != default else _shown(value),
                    "default": _shown(default),
                    "source": self._config.origins.get(name, ""),
                    "help": row.help,
                    "ours": row.ours,
                    "has_effect": row.has_effect,
                }
            )
        return {"settings": rows, "findings": [_as_row(finding) for finding in self._findings()]}

    def _findings(self) -> Iterator[machine.Finding]:
        """Of the doctor's checks those that start no process, and that do not mind that the server runs."""
        yield from machine.check_machine()
        yield from machine.check_python()
        yield from machine.check_compiled()
        yield from machine.check_clock()
        for warning in self._config.warnings:
            yield machine.Finding("WARN", "configuration", warning)
        yield from machine.check_open_files(self._config)
        yield from machine.check_cores(self._config)

    def _answers(self, word: int) -> int:
        board = self._board
        rows = [*map(board.web_row, range(layout.MAX_WEB_ROWS)), board.control_web_row]
        return sum(board.words[row + word] for row in rows)

    def _models(self) -> Iterator[dict[str, Any]]:
        with self._registry.changed:
            defaults = {(model.name, model.version) for model in self._registry.default_versions()}
            versions = self._registry.all_versions()
            found = [(model, [*model.workers.values(), *model.leaving.values()]) for model in versions]
        for model, workers in found:
            yield {
                **_description(model),
                "default": (model.name, model.version) in defaults,
                **self._numbers(model),
                "workers": [
                    _worker(worker, self._memory, is_leaving=worker.worker_id in model.leaving) for worker in workers
                ],
            }

    def _numbers(self, model: ModelVersion) -> dict[str, Any]:
        """What is counted of a version, summed over the batchers."""
        board = self._board
        rows = [board.model_row(batcher, model.spec.index) for batcher in sorted(model.loaded_in)]
        copies = [board.words[row : row + layout.MODEL_WORDS].tolist() for row in rows]
        words = _sums(copies, layout.MODEL_WORDS)
        counts = {name: words[word] for name, word in _COUNTS.items()}
        counts |= {name: words[one] + words[other] for name, (one, other) in _SUMS.items()}
        buckets = {name: words[first : first + size] for name, (first, size) in _BUCKETS.items()}
        return {**counts, **buckets, "curve": _curve(copies)}

    def _workflow(self, name: str, graph: Mapping[str, Any]) -> dict[str, Any]:
        index = graph["index"]
        words = [0] * layout.WORKFLOW_WORDS
        if index >= 0:
            rows = [self._board.workflow_row(row, index) for row in range(layout.MAX_WEB_ROWS)]
            copies = [self._board.words[row : row + layout.WORKFLOW_WORDS].tolist() for row in rows]
            words = _sums(copies, layout.WORKFLOW_WORDS)
        first = WorkflowWord.LATENCY_BUCKETS
        nodes = []
        for place, node in enumerate(graph["nodes"]):
            word = WorkflowWord.NODES + 2 * place
            is_counted = index >= 0 and place < layout.WORKFLOW_NODES
            runs, took_us = (words[word], words[word + 1]) if is_counted else (None, None)
            nodes.append({"name": node["name"], "runs": runs, "took_us": took_us})
        return {
            "name": name,
            "codes": dict(zip(map(str, layout.WORKFLOW_CODES), words, strict=False)),
            "latency_us": words[WorkflowWord.LATENCY_US],
            "latency": words[first : first + _TIMES],
            "retries": words[WorkflowWord.RETRIES],
            "timeouts": words[WorkflowWord.TIMEOUTS],
            "nodes": nodes,
            "drawing": self._drawing(name, graph),
        }

    def _drawing(self, name: str, graph: Mapping[str, Any]) -> dict[str, Any]:
        """Where the nodes of a workflow stand, which is worked out once for each graph."""
        known = self._drawings.get(name)
        if known is None or known[0] is not graph:
            known = self._drawings[name] = (graph, drawing(graph["nodes"]))
        return known[1]


class _Memory:
    """What processes have in memory, each read once in some seconds."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._forget_at = 0.0

    def begin(self) -> None:
        """A snapshot is taken: what is too old is read anew in it."""
        now = time.monotonic()
        if now >= self._forget_at:
            self._known, self._forget_at = {}, now + MEMORY_INTERVAL_S

    def of(self, pid: int) -> int:
        """The bytes of a process; 0 where there is none."""
        if pid <= 0:
            return 0
        known = self._known
        if pid not in known:
            known[pid] = resident_bytes(pid)
        return known[pid]


class _Gpus:
    """The GPUs as they were when somebody last looked: a thread asks the driver's tool, and nobody waits for it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._found: list[dict[str, Any]] = []
        self._next_look = 0.0

    def latest(self) -> list[dict[str, Any]]:
        """What is known; has it looked at anew where that is some seconds old."""
        with self._lock:
            now = time.monotonic()
            if self._count and now >= self._next_look:
                self._next_look = now + GPU_INTERVAL_S
                threading.Thread(target=self._look, name="console GPUs", daemon=True).start()
            return self._found

    def _look(self) -> None:
        found = gpu_details(self._count)
        with self._lock:
            self._found = found


def drawing(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the nodes of a graph stand (column and row), what they are, and the rows that each edge runs through.

    Args:
        nodes: as `Graph.to_json` writes them.
    """
    names = [node["name"] for node in nodes]
    successors: dict[str, list[str]] = {name: [] for name in names}
    for node in nodes:
        for parent in node["parents"]:
            successors[names[parent]].append(node["name"])
    order: list[str] = []
    while len(order) < len(nodes):
        order += [
            node["name"]
            for node in nodes
            if node["name"] not in order and all(names[parent] in order for parent in node["parents"])
        ]
    laid_out = lay_out(order, successors)
    return {
        "columns": len(laid_out.layers),
        "rows": laid_out.rows,
        "nodes": [
            {
                "name": node["name"],
                "column": laid_out.layer_of[node["name"]],
                "row": laid_out.row_of[node["name"]],
                "model": node["model"],
                "version": node["version"],
                "is_function": node["is_function"],
                "when": node["when"],
                "on_error": node["on_error"],
                "timeout_ms": node["timeout_ms"],
                "scatters": node["scatters"],
                "gathers": node["gathers"],
            }
            for node in nodes
        ],
        "edges": [{"from": edge.parent, "to": edge.child, "rows": edge.rows} for edge in laid_out.edges],
    }


def _description(model: ModelVersion) -> dict[str, Any]:
    spec = model.spec
    return {
        "name": model.name,
        "version": model.version,
        "workflow": model.workflow,
        "url": model.directory.url,
        "handler": spec.handler,
        "batch_size": spec.batch_size,
        "max_batch_delay_ms": spec.max_batch_delay_ms,
        "batch_policy": spec.batching or spec.batch_policy,
        "continuous": spec.continuous_batching,
        "asynchronous": spec.async_communication,
        "sequences": spec.sequence_batching,
        "job_queue_size": spec.job_queue_size,
        "response_timeout_s": spec.response_timeout_s,
        "parallel": spec.parallel_type,
        "min_workers": model.min_workers,
        "max_workers": model.max_workers,
        "restarts": model.restarts.total(),
        "unloading": model.unloading,
    }


def _sums(copies: Sequence[list[int]], size: int) -> list[int]:
    """The sums of the words of several rows of a size; there may be none."""
    if len(copies) == 1:
        return copies[0]
    return [sum(column) for column in zip(*copies, strict=True)] if copies else [0] * size


def _curve(copies: Sequence[Sequence[int]]) -> dict[str, float] | None:
    """What a batch costs as the batching rule has learnt it, of the batcher that has done most; None: nothing."""
    busiest = max(copies, key=lambda words: words[ModelWord.BATCHES], default=None)
    if busiest is None or not busiest[ModelWord.BATCHES]:
        return None
    fixed_ns, per_request_ns = busiest[ModelWord.FIXED_NS], busiest[ModelWord.PER_REQUEST_NS]
    return {"a_ms": fixed_ns / 1e6, "b_ms": per_request_ns / 1e6} if fixed_ns or per_request_ns else None


def _worker(worker: WorkerRecord, memory: _Memory, *, is_leaving: bool) -> dict[str, Any]:
    report = worker.report
    row: dict[str, Any] = {
        "id": worker.worker_id,
        "state": WorkerState.STARTING if report is None else report.state,
        "leaving": is_leaving,
        "gpus": worker.gpus,
        "since_ms": worker.created_at_ms,
    }
    if report is not None:
        row |= {
            "pid": report.pid,
            "memory": memory.of(report.pid),
            "since_ms": report.started_at_ms or worker.created_at_ms,
            "load_ms": report.load_ms,
            "progress": report.progress,
            "restarts": report.restarts,
            "last_end": report.exit_reason,
            "last_lines": report.last_lines,
        }
    return row


def _as_row(finding: machine.Finding) -> dict[str, str]:
    return {"level": finding.level, "subject": finding.subject, "text": finding.text}


def _shown(value: Any) -> str:
    """A value as one writes it; empty for none."""
    if value is None or value in ("", (), {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return json.dumps(value, default=str)
    return str(value)
