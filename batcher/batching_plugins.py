"""Batching plugins of a batcher: loaded when a model asks for one."""

from __future__ import annotations

import logging
from pathlib import Path

from wsgi_ts.batcher.scheduler.plugin_queue import PluginQueue, head_of
from wsgi_ts.messages import ModelSpec
from wsgi_ts.plugins.batching import load_rules
from wsgi_ts.plugins.found import add_folders
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.plugins.threads import within
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

#: How long the import of a policy may take, in seconds.
_IMPORT_LIMIT_S = 20.0


class BatchingPlugins:
    """Makes the queues of models that have a batching plugin."""

    def __init__(self, config: Config, run_dir: Path, batcher: int) -> None:
        self._config = config
        self._report = PluginReport(run_dir, f"batcher {batcher}")

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
        add_folders(self._config.plugins_path)
        wanted = spec.batching
        try:
            rules = within(_IMPORT_LIMIT_S, lambda: load_rules(self._config, wanted, self._report))
        except TimeoutError as error:
            log.error("%s %s: batching: %s cannot be imported: %s", spec.name, spec.version, wanted, error)
            return None
        return None if rules is None else PluginQueue(spec, rules, head_of)
