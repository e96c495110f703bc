"""All metrics of an instance, in the supervisor: what `/metrics` shows and what ts_metrics.log gets.

Three sources meet here, each read or told when it is needed, none on the way of a request:

* the board in shared memory, on which batchers and web workers count (`board`);
* what handlers report: their lines are read, checked and summed by the worker templates, and come as updates over the
  batchers' channels (`reported`);
* the system metrics, measured by a thread (`system`), and what the registry knows of the model workers.

The metrics API asks over the control socket and sends the text as it is. In the modes `log` and `legacy` a thread
writes ts_metrics.log: counters with what they went up by, gauges with their value, each where it has changed, and the
system metrics whenever they were measured. What comes after a quiet second is written at once, and then more and more
seldom, down to once a second.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import BatcherWord
from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.metrics.exposition import Family, Renderer, server_line
from wsgi_ts.metrics.reported import PROMETHEUS_MODE, ReportedMetrics
from wsgi_ts.metrics.specification import COUNTER, MetricsConfigError, MetricSpec, load_specification
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.plugins.report import counts
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.metrics.board import HOST_LEVEL, BoardMetrics, ModelCounts, Values
from wsgi_ts.supervisor.metrics.http import http_family
from wsgi_ts.supervisor.metrics.instance import InstanceMetrics
from wsgi_ts.supervisor.metrics.load import LoadGauges
from wsgi_ts.supervisor.metrics.system import SystemMetrics
from wsgi_ts.supervisor.metrics.workflows import workflow_families

log = logging.getLogger(__name__)

#: Longest time from one line of a metric that goes on changing to the next, in seconds.
LOG_INTERVAL_S = 1.0
#: Time from one look for answers to the next, and least time from one line to the next, in seconds.
_LOOK_S = 0.1
#: How long batchers that were woken get at most to count what their workers have finished, in seconds. One that has
#: work without end does not sleep, and counts as it goes.
_SETTLE_LIMIT_S = 0.1
#: The first pause between two looks whether they have; each is twice as long as the one before.
_SETTLE_LOOK_S = 0.0005
_LEGACY_MODE = "legacy"
_THREAD = "metrics"
#: What `/metrics` shows in the mode `legacy`; ts_metrics.log has the others.
_LEGACY_NAMES = ("ts_inference_requests_total", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds")


class MetricsCollector:
    """The metrics of one instance. Its methods may be called from any thread.

    Args:
        log_files: for ts_metrics.log.
        gpus: how many GPUs models may use.
        run_dir: where processes say what has become of their plugins; None: nobody does.
    """

    def __init__(
        self,
        config: Config,
        board: Board,
        registry: Registry,
        log_files: LogFiles,
        gpus: int,
        run_dir: Path | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._mode = config.metrics_mode
        self._registry = registry
        self._log_files = log_files
        self._hostname = socket.gethostname()
        try:
            specification = load_specification(config.metrics_config, for_prometheus=self._mode == PROMETHEUS_MODE)
        except MetricsConfigError as error:
            log.error("No metrics are recorded: metrics_config: %s", error)
            specification = None
        self._specs = dict(specification.server) if specification is not None else {}
        self._reported = ReportedMetrics(specification)
        self._words = board
        self._board = BoardMetrics(board, gpus + 1, self._hostname)
        self._load = LoadGauges(vllm_names=config.vllm_metric_names)
        self._instance = InstanceMetrics(config, board.prefix)
        self._renderer = Renderer()
        self._rendering = threading.RLock()
        # Never closed: somebody may ask for the metrics until the very end.
        self._bells = [board.batcher_bell(index) for index in range(gpus + 1)]
        self._system_values: dict[str, Values] = {}
        self._logged: dict[str, Values] = {}
        self._stopped = threading.Event()
        self._asked = threading.Event()
        self._system: SystemMetrics | None = None
        if specification is not None and not config.disable_system_metrics:
            self._system = SystemMetrics(
                interval_s=config.metric_time_interval,
                gpus=gpus,
                hostname=self._hostname,
                command=config.system_metrics_cmd,
                home=config.model_server_home,
                worker_pids=self._worker_pids,
                publish=self._take_system_values,
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures the system and writes the log; at the end also what was counted since the last line."""
        writer = threading.Thread(target=self._write_log, name=_THREAD, daemon=True)
        if self._system is not None:
            self._system.start()
        if self._mode != PROMETHEUS_MODE:
            writer.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._asked.set()
            if self._system is not None:
                self._system.stop()
            if self._mode != PROMETHEUS_MODE:
                writer.join(LOG_INTERVAL_S)
                self._log_changes()

    def text(self, names: Collection[str] = ()) -> str:
        """What `/metrics` answers: only the metrics of these names, if there are any."""
        if self._mode not in (PROMETHEUS_MODE, _LEGACY_MODE):
            return ""
        self._settle()
        with self._rendering:
            if self._mode == PROMETHEUS_MODE:
                return self._renderer.render(self.families(), names)
            shown = [each for each in self._server_families(self._counts()) if each.name in _LEGACY_NAMES]
            return self._renderer.render(shown, names)

    def batch_counts(self, model: ModelVersion) -> dict[str, Any]:
        """What a version's workers have done so far: see `BoardMetrics.batch_counts`."""
        self._settle()
        return self._board.batch_counts(model)

    def families(self) -> list[Family]:
        """All metrics with their present values."""
        with self._rendering:
            models = self._counts()
            families = [*self._server_families(models), *self._reported.families(), *self._board.own_families(models)]
            families += workflow_families(self._words, self._registry.workflows.graphs())
            families += [*self._load.families(models), http_family(self._words), *self._instance.families()]
            return [*families, *self._plugin_families()]

    def worker_changed(self) -> None:
        """A model worker was loaded, or has ended: the log tells of it at once."""
        self._asked.set()

    def take_updates(self, updates: Sequence[list[Any]]) -> None:
        """Adds what handlers have reported (`ModelMetrics.take_updates`)."""
        self._reported.apply(updates)

    def _worker_pids(self) -> list[int]:
        with self._registry.changed:
            reports = [worker.report for model in self._registry.all_versions() for worker in model.workers.values()]
        return [report.pid for report in reports if report is not None and report.pid > 0]

    def _load_times(self) -> Values:
        """How long each model worker took to load, in milliseconds."""
        with self._registry.changed:
            return {
                (model.spec.worker_name(worker.worker_id), HOST_LEVEL, self._hostname): worker.report.load_ms
                for model in self._registry.all_versions()
                for worker in model.workers.values()
                if worker.report is not None and worker.report.load_ms
            }

    def _counts(self) -> list[ModelCounts]:
        return self._board.read(self._registry.all_versions())

    def _server_values(self, models: Sequence[ModelCounts]) -> dict[str, Values]:
        """What the server itself records, but for the system metrics, by name."""
        return self._board.server_values(models) | {"WorkerLoadTime": self._load_times()}

    def _server_families(self, models: Sequence[ModelCounts]) -> list[Family]:
        values = self._server_values(models) | self._system_values
        families = []
        for spec in self._specs.values():
            family = Family.of(spec)
            found = values.get(spec.name, {})
            if spec.order == tuple(range(len(spec.order))):  # a server with many model workers has many load times
                family.samples = {each: value for each, value in found.items() if len(each) == len(spec.order)}
            else:
                in_order = ((_ordered(spec, each), value) for each, value in found.items())
                family.samples = {each: value for each, value in in_order if each is not None}
            families.append(family)
        return families

    def _plugin_families(self) -> list[Family]:
        if self._run_dir is None:
            return []
        errors = Family("ts_plugin_errors_total", COUNTER, "Failures of plugins", ("plugin",))
        dropped = Family("ts_plugin_events_dropped_total", COUNTER, "Events that a plugin was not told of", ("plugin",))
        for family, what in ((errors, "errors"), (dropped, "dropped")):
            family.samples |= {(name,): count for name, count in counts(self._run_dir, what).items()}
        return [family for family in (errors, dropped) if family.samples]

    def _take_system_values(self, values: dict[str, Values]) -> None:
        for name in values.keys() - self._system_values.keys():
            spec = self._specs.get(name)
            if spec is not None and any(_ordered(spec, dimensions) is None for dimensions in values[name]):
                log.error("The system metric %s has other dimensions than metrics.yaml says: %s", name, spec.dimensions)
        self._system_values = values
        if self._mode != PROMETHEUS_MODE:
            now_s = int(time.time())
            lines = [
                line
                for name, found in values.items()
                if (spec := self._specs.get(name)) is not None
                for dimensions, value in found.items()
                if (line := _line(spec, dimensions, value, now_s)) is not None
            ]
            self._log_files.ts_metrics.write(lines, thread=_THREAD)

    def _settle(self) -> None:
        """Has the batchers count what model workers have finished: those that sleep find out four times a second.

        They are waited for, on a busy machine longer than on an idle one: who has just got an answer looks for it here.
        """
        words, pause_s, until = self._words.words, _SETTLE_LOOK_S, time.monotonic() + _SETTLE_LIMIT_S
        awaited = {}
        for index, bell in enumerate(self._bells):
            row = self._words.batcher_row(index)
            if words[row + BatcherWord.HEARTBEAT_NS]:
                # What it goes to sleep over the first time it may have looked for before.
                awaited[row + BatcherWord.SLEEPS] = (bell, words[row + BatcherWord.SLEEPS] + 2)
        while awaited and time.monotonic() < until:
            for bell, _ in awaited.values():
                bell.ring()
            time.sleep(pause_s)
            pause_s *= 2
            awaited = {word: (bell, sleeps) for word, (bell, sleeps) in awaited.items() if words[word] < sleeps}

    def _write_log(self) -> None:
        answers, pause_s, looked_at = 0, _LOOK_S, time.monotonic()
        while not self._stopped.is_set():
            asked = self._asked.wait(pause_s)
            self._asked.clear()
            now, counted = time.monotonic(), self._board.answers()
            quiet = counted == answers and not asked
            if quiet and now - looked_at < LOG_INTERVAL_S:
                continue
            pause_s = _LOOK_S if quiet else min(2 * pause_s, LOG_INTERVAL_S)
            answers, looked_at = counted, now
            try:
                if not quiet:
                    self._settle()
                self._log_changes()
            except Exception:
                log.exception("ts_metrics.log misses a second")

    def _log_changes(self) -> None:
        """Writes what has changed since the last time."""
        now_s = int(time.time())
        values = self._server_values(self._counts())
        with self._registry.changed:
            # Before any request: who reads the log after the first one finds the counter, if not yet its rise.
            for name, found in self._board.first_counts(self._registry.default_versions()).items():
                values[name] = found | values[name]
        lines = []
        for name, found in values.items():
            spec = self._specs.get(name)
            if spec is None or (self._mode == _LEGACY_MODE and name in _LEGACY_NAMES):
                continue
            before = self._logged.get(name, {})
            for dimensions, value in found.items():
                old = before.get(dimensions)
                if value == old:
                    continue
                # A counter below its last value belongs to a model that was registered anew.
                shown = value - old if spec.kind == COUNTER and old is not None and old < value else value
                line = _line(spec, dimensions, shown, now_s)
                if line is not None:
                    lines.append(line)
        self._logged = values
        self._log_files.ts_metrics.write(lines, thread=_THREAD)


def _ordered(spec: MetricSpec, values: Sequence[str]) -> tuple[str, ...] | None:
    """The values of the dimensions in the order of metrics.yaml; None where there are more or fewer of them."""
    return tuple(values[place] for place in spec.order) if len(values) == len(spec.order) else None


def _line(spec: MetricSpec, dimensions: Sequence[str], value: float, now_s: int) -> str | None:
    ordered = _ordered(spec, dimensions)
    return None if ordered is None else server_line(spec, ordered, value, now_s)
