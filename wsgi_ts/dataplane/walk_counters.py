"""What a process counts of workflows on the board: requests by status, their times, and those of the nodes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import TIME_BUCKETS_US, WORKFLOW_CODES, WORKFLOW_NODES, WorkflowWord

_PLACES = {code: place for place, code in enumerate(WORKFLOW_CODES)}
_OTHER = len(WORKFLOW_CODES) - 1


class WalkCounters:
    """The counters of one segment's owner."""

    def __init__(self, board: Board, segment_index: int) -> None:
        self._board = board
        self._segment_index = segment_index

    def ended(self, workflow: int, code: int, took_us: int, nodes_us: Sequence[int]) -> None:
        """Counts a request that has ended.

        `workflow` is its number on the board, -1: it is not counted; the code is 499 where the client has gone; a node
        that has not run has 0 in `nodes_us`.
        """
        if workflow < 0:
            return
        words = self._board.words
        row = self._board.workflow_row(self._segment_index, workflow)
        words[row + WorkflowWord.CODES + _PLACES.get(code, _OTHER)] += 1
        words[row + WorkflowWord.LATENCY_US] += took_us
        words[row + WorkflowWord.LATENCY_BUCKETS + bisect_left(TIME_BUCKETS_US, took_us)] += 1
        for place, node_us in enumerate(nodes_us[:WORKFLOW_NODES]):
            if node_us:
                words[row + WorkflowWord.NODES + 2 * place] += 1
                words[row + WorkflowWord.NODES + 2 * place + 1] += node_us

    def refused(self, workflow: int, code: int) -> None:
        """Counts a request that was answered before it had begun: by its status alone, for it has taken no time."""
        self.count(workflow, WorkflowWord.CODES + _PLACES.get(code, _OTHER))

    def count(self, workflow: int, word: int) -> None:
        """Adds one to a word of WorkflowWord."""
        if workflow >= 0:
            self._board.words[self._board.workflow_row(self._segment_index, workflow) + word] += 1
