"""Batching plugins of a batcher: loaded when a model asks for one.

One that never comes back from a call takes the batcher's loop along, until the supervisor kills the batcher. Of which
model version a plugin is being called stands on the board: the next life of the batcher does without it. It is asked
again once the model is registered anew, which clears the word.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from wsgi_ts.batcher.scheduler.plugin_queue import PluginQueue, head_of
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import MAX_MODELS, ModelWord, PolicyState
from wsgi_ts.messages import ModelSpec
from wsgi_ts.plugins.batching import INSTEAD, load_rules, wanted_policy
from wsgi_ts.plugins.found import add_folders
from wsgi_ts.plugins.report import OFF, PluginReport
from wsgi_ts.plugins.threads import LOAD_LIMIT_S
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)


class BatchingPlugins:
    """Makes the queues of models that have a batching plugin; to be made once in the life of a batcher."""

    def __init__(self, config: Config, run_dir: Path, board: Board, batcher: int) -> None:
        self._config = config
        self._report = PluginReport(run_dir, f"batcher {batcher}")
        self._board = board
        self._batcher = batcher
        #: Those whose import has not come back; it would take as long again for the next model.
        self._hung: set[str] = set()
        self._ended_the_last = {index for index in range(MAX_MODELS) if self._state(index) == PolicyState.CALLED}
        for index in self._ended_the_last:
            board.words[self._word(index)] = PolicyState.OFF

    def queue_for(self, spec: ModelSpec) -> PluginQueue | None:
        """The queue of a model version; None for one that the built-in rule serves."""
        if not spec.batching:
            return None
        if spec.continuous_batching or spec.async_communication or spec.sequence_batching or spec.use_job_ticket:
            log.warning(
                "%s %s: batching: %s has no effect on a model whose requests are not batched together",
                *(spec.name, spec.version, spec.batching),
            )
            return None
        found = wanted_policy(self._config, spec.batching)
        if self._state(spec.index) == PolicyState.OFF:
            if spec.index in self._ended_the_last:
                self._ended_the_last.remove(spec.index)
                told = f"a call of it for {spec.name} {spec.version} did not come back, and ended the batcher"
                self._report.failed(found, told, state=OFF, instead=INSTEAD)
            return None
        if spec.batching in self._hung:
            log.warning("%s %s: batching: %s hangs while imported; %s", spec.name, spec.version, spec.batching, INSTEAD)
            return None
        add_folders(self._config.plugins_path)
        began = time.monotonic()
        rules = load_rules(found, self._report, self._board.words, self._word(spec.index))
        if rules is None and time.monotonic() - began >= LOAD_LIMIT_S:
            self._hung.add(spec.batching)
        return None if rules is None else PluginQueue(spec, rules, head_of)

    def _state(self, model: int) -> int:
        return self._board.words[self._word(model)]

    def _word(self, model: int) -> int:
        return self._board.model_row(self._batcher, model) + ModelWord.POLICY
