"""What the processes that walk graphs count of workflows on the board, read for the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import WorkflowWord
from wsgi_ts.metrics.exposition import Family, Histogram
from wsgi_ts.metrics.specification import COUNTER, HISTOGRAM
from wsgi_ts.supervisor.metrics.board import sums

_SECONDS = tuple(bound / 1e6 for bound in layout.TIME_BUCKETS_US)
_NAME = ("workflow_name",)
_NODE = ("workflow_name", "node")
#: As TorchServe's own names begin, which has no metrics of workflows.
_FIRST = "ts_workflow_"


def workflow_words(board: Board, workflow: int) -> list[int]:
    """The words of a workflow by its number, summed over the processes."""
    starts = [board.workflow_row(row, workflow) for row in range(layout.MAX_WEB_ROWS)]
    return sums([board.words[start : start + layout.WORKFLOW_WORDS].tolist() for start in starts])


def workflow_families(board: Board, graphs: Mapping[str, Mapping[str, Any]]) -> list[Family]:
    """The metrics of workflows, which are given by their names as they are published."""
    requests = Family(f"{_FIRST}requests_total", COUNTER, "Requests by status", (*_NAME, "code"))
    total = Family(f"{_FIRST}latency_microseconds", COUNTER, "Sum of those times, in microseconds", _NAME)
    latency = Family(f"{_FIRST}latency_seconds", HISTOGRAM, "Time from a request to its answer, in seconds", _NAME)
    retries = Family(f"{_FIRST}retries_total", COUNTER, "Attempts of nodes after their first one", _NAME)
    timeouts = Family(f"{_FIRST}timeouts_total", COUNTER, "Attempts of nodes that were too late", _NAME)
    runs = Family(f"{_FIRST}node_runs_total", COUNTER, "Requests for which the node has run", _NODE)
    times = Family(f"{_FIRST}node_seconds_total", COUNTER, "Time that the node has taken, in seconds", _NODE)
    for name, graph in graphs.items():
        if graph["index"] < 0:
            continue
        words = workflow_words(board, graph["index"])
        for place, code in enumerate(layout.WORKFLOW_CODES):
            if count := words[WorkflowWord.CODES + place]:
                requests.samples[name, str(code)] = count
        first, total_us = WorkflowWord.LATENCY_BUCKETS, words[WorkflowWord.LATENCY_US]
        total.samples[(name,)] = total_us
        latency.samples[(name,)] = Histogram(_SECONDS, words[first : first + len(_SECONDS) + 1], total_us / 1e6)
        retries.samples[(name,)] = words[WorkflowWord.RETRIES]
        timeouts.samples[(name,)] = words[WorkflowWord.TIMEOUTS]
        for place, node in enumerate(graph["nodes"][: layout.WORKFLOW_NODES]):
            word = WorkflowWord.NODES + 2 * place
            runs.samples[name, node["name"]] = words[word]
            times.samples[name, node["name"]] = words[word + 1] / 1e6
    return [requests, total, latency, retries, timeouts, runs, times] if graphs else []
