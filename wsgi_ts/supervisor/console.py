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
from wsgi_ts.batcher.shm.layout import WorkflowWord
from wsgi_ts.cgroup import usable_cores
from wsgi_ts.checks import machine
from wsgi_ts.gpu.devices import gpu_details
from wsgi_ts.models.registry import Registry
from wsgi_ts.settings.config import Config, property_settings
from wsgi_ts.supervisor.console_models import TIMES, Memory, ModelTexts
from wsgi_ts.supervisor.metrics.board import RESPONSES, responses
from wsgi_ts.supervisor.metrics.workflows import workflow_words
from wsgi_ts.workflows.layout import lay_out

#: How often the GPUs are looked at while somebody looks at the console, in seconds; it takes a process.
GPU_INTERVAL_S = 5.0
#: How often it is looked how many cores there are, which a container's limits say.
CORES_INTERVAL_S = 5.0
#: What is shown in place of a value that is a secret, and the parts of the names of such keys.
HIDDEN = "••••••"
_SECRET = ("pass", "secret", "credential", "otlp_headers")


class ConsoleData:
    """The console's view of one instance; used from any thread.

    Args:
        board: what is counted.
        batchers: how many batchers there are.
        status: what `wsgi-ts status` shows, without its tables.
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
        self._memory = Memory()
        self.models = ModelTexts(board, registry, self._memory)
        self._lock = threading.Lock()
        self._cores = 0
        self._look_at = 0.0
        #: The drawings of the workflows by name, each with the graph that it is of.
        self._drawings: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {}

    def snapshot(self, *, since: int = 0) -> str:
        """Everything that may change.

        Args:
            since: the revision of a snapshot that is known already: of the models only those are told that have
                changed since, and where only numbers have, these.

        Returns:
            The snapshot's revision, a space, and the snapshot as JSON in one line: a text goes through the control
            socket as it is.
        """
        status = self._status()
        with self._lock:
            models = self.models.latest(since)
            for process in status["processes"]:
                process["memory"] = self._memory.of(process.get("pid") or -1)
            cores = self._usable_cores()
        server = {
            **status,
            "hostname": self._hostname,
            "cores": cores,
            "model_api": self._config.enable_model_api,
            "combined": self._config.is_combined,
            "tokens": self._config.token_authorization,
        }
        data = {
            "at": time.time(),
            "server": server,
            "answers": {name: responses(self._board, word) for name, word in RESPONSES.items()},
            "time_bounds_us": layout.TIME_BUCKETS_US,
            "batch_bounds": layout.BATCH_SIZES,
            "workflows": [self._workflow(name, graph) for name, graph in self._registry.workflows.graphs().items()],
            "gpus": self._gpus.latest(),
            "order": models.order,
        }
        rest = json.dumps(data, separators=(",", ":"))[:-1]
        return f'{models.revision} {rest},"models":[{",".join(models.changed)}]}}'

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

    def _usable_cores(self) -> int:
        now = time.monotonic()
        if now >= self._look_at:
            self._cores, self._look_at = usable_cores(), now + CORES_INTERVAL_S
        return self._cores

    def _workflow(self, name: str, graph: Mapping[str, Any]) -> dict[str, Any]:
        index = graph["index"]
        words = workflow_words(self._board, index) if index >= 0 else [0] * layout.WORKFLOW_WORDS
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
            "latency": words[first : first + TIMES],
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
    """Where the nodes of a `Graph` (as JSON) stand, what they are, and the rows that each edge runs through."""
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
