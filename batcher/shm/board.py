"""The board: one small shared page set for what all processes of a server may read.

Owned by the supervisor, which writes the epochs; every other word has one writer (see `layout`).
"""

from __future__ import annotations

from collections.abc import Iterable

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.shared_memory import SharedMemory, unlink


def board_name(prefix: str) -> str:
    """Name of the instance's board."""
    return f"{prefix}-board"


def batcher_bell_name(prefix: str, batcher: int) -> str:
    """Name of a batcher's doorbell."""
    return f"{prefix}-b{batcher}"


class Board:
    """The mapped board of one instance; `words` is all of it as 64-bit words."""

    def __init__(self, memory: SharedMemory, prefix: str) -> None:
        self._memory = memory
        self.prefix = prefix
        self.words = memory.words(0, memory.size // layout.WORD)

    @classmethod
    def create(cls, prefix: str, batchers: int = 1) -> Board:
        """Makes the board of a new instance with so many batchers.

        Raises:
            SharedMemoryFull: /dev/shm has no room for it.
        """
        size = layout.board_bytes(batchers)
        board = cls(SharedMemory(board_name(prefix), size, reserve=size, create=True), prefix)
        board.words[1] = layout.LAYOUT_VERSION
        board.words[0] = layout.MAGIC
        return board

    @classmethod
    def attach(cls, prefix: str) -> Board:
        """Maps the board of a running instance.

        Raises:
            FileNotFoundError: no such instance.
            ValueError: it belongs to another version of this server.
        """
        board = cls(SharedMemory(board_name(prefix)), prefix)
        if board.words[0] != layout.MAGIC or board.words[1] != layout.LAYOUT_VERSION:
            raise ValueError("the shared memory of this server was made by another version of wsgi-ts")
        return board

    @staticmethod
    def unlink(prefix: str) -> None:
        """Removes the board's name."""
        unlink(board_name(prefix))

    @property
    def epoch(self) -> int:
        """Changes whenever routes.json is published."""
        return self.words[layout.BOARD_EPOCH]

    def bump_epoch(self) -> None:
        """Tells all readers to read routes.json again."""
        self.words[layout.BOARD_EPOCH] += 1

    def bump_token_epoch(self) -> None:
        """Tells all readers to read tokens.json again."""
        self.words[layout.BOARD_TOKEN_EPOCH] += 1

    def batcher_row(self, batcher: int) -> int:
        """First word of a batcher's row."""
        return layout.BOARD_BATCHERS + batcher * layout.BATCHER_WORDS

    def web_row(self, segment_index: int) -> int:
        """First word of the counters of the web worker that owns a segment.

        Rows are used again by later segments, which add to what is there, so the sums never go down.
        """
        return layout.BOARD_WEB + segment_index % layout.MAX_WEB_ROWS * layout.WEB_WORDS

    @property
    def control_web_row(self) -> int:
        """First word of the counters of the web worker that serves no predictions."""
        return layout.BOARD_WEB + layout.MAX_WEB_ROWS * layout.WEB_WORDS

    def http_row(self, segment_index: int) -> int:
        """First word of the times of answers of the web worker that owns a segment."""
        return layout.BOARD_HTTP + segment_index % layout.MAX_WEB_ROWS * layout.HTTP_SERIES * layout.HTTP_WORDS

    @property
    def control_http_row(self) -> int:
        """First word of the times of answers of the web worker that serves no predictions."""
        return layout.BOARD_HTTP + layout.MAX_WEB_ROWS * layout.HTTP_SERIES * layout.HTTP_WORDS

    def refusals(self, segment_index: int) -> int:
        """First word of how many requests the owner of a segment has refused, by the model version's number."""
        return layout.BOARD_REFUSALS + segment_index % layout.MAX_WEB_ROWS * layout.MAX_MODELS

    def clear_model(self, model_index: int) -> None:
        """Zeroes what earlier owners of a number have counted. Only while no batcher knows the number."""
        for row in range(layout.MAX_WEB_ROWS):
            self.words[self.refusals(row) + model_index] = 0
        step = layout.MAX_MODELS * layout.MODEL_WORDS
        for row in range(self.model_row(0, model_index), len(self.words), step):
            for word in range(layout.MODEL_WORDS):
                self.words[row + word] = 0

    def model_row(self, batcher: int, model_index: int) -> int:
        """First word of a model version's row on a batcher."""
        return layout.BOARD_MODELS + (batcher * layout.MAX_MODELS + model_index) * layout.MODEL_WORDS

    def workflow_row(self, segment_index: int, workflow: int) -> int:
        """First word of what the owner of a segment counts of a workflow."""
        row = segment_index % layout.MAX_WEB_ROWS * layout.MAX_WORKFLOWS + workflow
        return layout.BOARD_WORKFLOWS + row * layout.WORKFLOW_WORDS

    def clear_workflow(self, workflow: int) -> None:
        """Zeroes what was counted of an earlier workflow of this number."""
        for segment in range(layout.MAX_WEB_ROWS):
            row = self.workflow_row(segment, workflow)
            for word in range(layout.WORKFLOW_WORDS):
                self.words[row + word] = 0

    def queued(self, batchers: Iterable[int], model_index: int) -> int:
        """How many requests of a model version wait on some batchers."""
        return sum(self.words[self.model_row(batcher, model_index) + layout.ModelWord.QUEUED] for batcher in batchers)

    def outstanding(self, batchers: Iterable[int], model_index: int) -> int:
        """How many requests of a model version are under way on some batchers, or wait there."""
        word = layout.ModelWord.OUTSTANDING
        return sum(self.words[self.model_row(batcher, model_index) + word] for batcher in batchers)

    def batcher_bell(self, batcher: int) -> Doorbell:
        """The doorbell of a batcher."""
        word = self.batcher_row(batcher) + layout.BatcherWord.ASLEEP
        return Doorbell(batcher_bell_name(self.prefix, batcher), self.words, word)

    def close(self) -> None:
        """Closes the descriptor."""
        self._memory.close()
