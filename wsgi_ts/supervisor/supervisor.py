"""The supervisor, which starts, watches and stops all other processes of an instance.

Its main thread owns every child (a child dies with the thread that started it), the batchers' channels and the
segments' numbers, in one selector loop (`loop`, `batchers`, `servers`). Operations on models run on the threads of the
control socket (`operations`, `models.manager`); what they need of the main thread is posted to it. It never touches
what is in a segment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION, __version__, compiled_modules
from wsgi_ts.checks.start import StartError, check_machine, check_run_directory
from wsgi_ts.control.server import ControlServer
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.guard.protocol import FORWARDED, MODELS
from wsgi_ts.instance.pid_file import remove_pid_file
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.messages import ReopenLogs, Stop
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.queries import ModelQueries
from wsgi_ts.models.recorded import SnapshotError
from wsgi_ts.models.reloading import Reloader
from wsgi_ts.models.snapshots import SnapshotWriter
from wsgi_ts.models.startup import ModelsToStart, StartupModels, models_to_start
from wsgi_ts.plugins.events import Events
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.batchers import Batchers
from wsgi_ts.supervisor.child import Owner, SupervisedProcess
from wsgi_ts.supervisor.console import ConsoleData
from wsgi_ts.supervisor.ending import FAST_STOP_S, Ending
from wsgi_ts.supervisor.loop import MainLoop
from wsgi_ts.supervisor.metrics.collector import MetricsCollector
from wsgi_ts.supervisor.metrics.sinks import start_sinks
from wsgi_ts.supervisor.operations import ControlOperations
from wsgi_ts.supervisor.resources import Resources
from wsgi_ts.supervisor.servers import Servers, make_servers
from wsgi_ts.supervisor.spare_processes import Spares
from wsgi_ts.supervisor.start import fetchers, say_started, snapshot_store, start_log_rotation, start_traces
from wsgi_ts.supervisor.worker_events import WorkerEvents
from wsgi_ts.tracing.store import TraceStore
from wsgi_ts.workflows.manager import WorkflowManager
from wsgi_ts.workflows.startup import StartupWorkflows

log = logging.getLogger(__name__)

#: Longest wait of the loop, in seconds; shorter while something is due.
_IDLE_WAIT_S = 1.0
_BUSY_WAIT_S = 0.05
#: How long gunicorn gets on top of `graceful_timeout`, and a batcher to stop, in seconds.
_WEB_MARGIN_S = 4.0
_BATCHER_STOP_S = 3.0
#: At an upgrade, how long connections that are in use get to end with an answer, in seconds.
_UPGRADE_DELAY_S = 1.0
#: How long plugins may take to hear the last events, in seconds.
_EVENTS_LIMIT_S = 1.0


class Supervisor:
    """One instance from start to stop: `run` is all of its life."""

    def __init__(
        self,
        config: Config,
        guard: GuardLink,
        run_dir: Path,
        log_plan: LogPlan,
        log_files: LogFiles,
        spares: Spares,
    ) -> None:
        self._config = config
        self._spares = spares
        self._guard = guard
        self._run_dir_path = run_dir
        self._log_plan = log_plan
        self._log_files = log_files
        self._started_at = time.monotonic()
        self._loop = MainLoop()
        self._ending = Ending(config, guard)
        self._next_look = 0.0
        self._models_registered = False
        self._serves = False
        self._announced = False
        self._sinks_stopped = threading.Event()

    def run(self) -> int:
        """Starts everything, serves until a signal or an operation says stop; returns the exit code.

        Raises:
            StartError: it cannot start (also RunDirectoryError, BindError); nothing is left behind.
        """
        with contextlib.ExitStack() as stack:
            self._start(stack)
            while not self._ending.requests:
                self._turn()
            if self._ending.failure:
                raise StartError(self._ending.failure)
            self._leave()
            self._drain()
        if not self._ending.exit_code and not self._ending.is_replaced:
            remove_pid_file(self._guard.pid or os.getpid())
        log.info("Torchserve stopped.")
        return self._ending.exit_code

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Makes everything in order; `stack` undoes it in reverse."""
        config = self._config
        stack.callback(self._loop.close)
        self._install_signals()
        check_machine()
        check_run_directory(self._run_dir_path)
        try:
            models = models_to_start(config, self._guard.kept_json(MODELS))
        except SnapshotError as error:
            raise StartError(str(error)) from error
        self._held = Resources(
            config, self._guard, self._run_dir_path, self._log_plan, stack, lambda: not self._ending.is_followed
        )
        self._registry = self._held.registry
        self._make_managers()
        self._make_processes()
        self._start_all(models, stack)

    def _make_managers(self) -> None:
        """Makes what models and workflows are managed with."""
        config, held = self._config, self._held
        board, models, publish = held.board, held.directory.models, held.publisher.routes
        self._metrics = MetricsCollector(config, board, self._registry, self._log_files, held.gpus, held.directory.path)
        self._traces = TraceStore()
        self._events = Events(config, held.plugins)
        self._snapshots = SnapshotWriter(
            config,
            self._registry,
            lambda kept: self._guard.keep_json(MODELS, kept),
            snapshot_store(config, held.plugins),
        )
        fetched_by = fetchers(config, held.plugins)
        self._manager = ModelManager(
            config,
            self._registry,
            models,
            gpus=held.gpus,
            send=lambda batcher, message: self._batchers.send(batcher, message),  # noqa: PLW0108 (made below)
            publish=publish,
            record=self._snapshots.record,
            forget=self._snapshots.forget,
            events=self._events,
            fetchers=fetched_by,
        )
        self._queries = ModelQueries(self._registry, lambda model: board.queued(model.loaded_in, model.spec.index))
        self._workflows = WorkflowManager(
            config,
            self._registry,
            self._manager,
            models,
            publish=publish,
            outstanding=lambda model: board.outstanding(model.loaded_in, model.spec.index),
            record=self._snapshots.record,
            fetchers=fetched_by,
        )

    def _make_processes(self) -> None:
        """Makes the processes that serve, of which nothing runs yet, and the control socket."""
        config, held = self._config, self._held
        owner = Owner(
            self._loop,
            held.directory,
            self._registry,
            on_ready=self._announce,
            on_failure=self._ending.fail,
            spares=self._spares,
        )
        self._batchers = Batchers(
            held.devices,
            owner,
            board=held.board,
            manager=self._manager,
            metrics=self._metrics,
            events=WorkerEvents(self._events, self._registry),
            publish=held.publisher.routes,
        )
        self._servers = Servers(make_servers(config, held), owner)
        operations = ControlOperations(
            loop=self._loop,
            registry=self._registry,
            manager=self._manager,
            queries=self._queries,
            workflows=self._workflows,
            metrics=self._metrics,
            console=ConsoleData(
                config, held.board, self._registry, len(held.devices), lambda: self._loop.call(self._facts)
            ),
            segments=self._batchers.segments,
            keys=held.keys,
            status=self._status,
            stop=self._ending.request,
            replace=self._replace,
            traces=self._traces,
        )
        self._control = ControlServer(held.directory.control_socket, operations.table())

    def _start_all(self, first: ModelsToStart, stack: contextlib.ExitStack) -> None:
        """Starts threads and processes, and the registering of the models."""
        try:
            self._control.start()
        except OSError as error:
            raise StartError(f"control socket {self._held.directory.control_socket}: {error}") from error
        stack.callback(self._control.stop)
        if self._config.keeps_traces:
            start_traces(self._traces, self._held.directory.traces_socket, self._loop.selector, stack)
        stack.enter_context(self._metrics.running())
        start_sinks(self._config, self._metrics.families, self._held.plugins, self._sinks_stopped)
        stack.callback(self._kill_children)
        start_log_rotation(self._log_files, lambda: self._loop.post(self._reopen_logs), stack)
        if self._config.reload:
            reloader = Reloader(self._registry, self._manager)
            reloader.start()
            stack.callback(reloader.stop)
        for each in self._running():
            each.gives_up = self._guard.life == 1 or self._guard.is_trial
        try:
            self._batchers.start()
            if not self._guard.is_trial:
                self._serve()
        except (OSError, RuntimeError) as error:
            raise StartError(f"a process or thread cannot be started: {error}") from error
        workflows = StartupWorkflows(self._config, first, self._registry, self._workflows, self._held.publisher.routes)
        workflows.expect()
        models = StartupModels(self._config, first, self._registry, self._manager, self._snapshots, workflows.register)
        threading.Thread(
            target=models.register,
            args=(lambda: self._loop.post(self._on_models_registered),),
            name="startup models",
            daemon=True,
        ).start()

    def _serve(self) -> None:
        """Starts what takes requests.

        In the place of another supervisor only when the models are loaded: until then who comes waits, and is not told
        that there is no worker.

        Raises:
            OSError, RuntimeError: a process or thread cannot be started.
        """
        self._serves = True
        self._servers.start()
        self._spares.close()

    def _install_signals(self) -> None:
        self._loop.handle_signals(
            {
                signal.SIGTERM: lambda: self._ending.request(1),
                signal.SIGINT: lambda: self._ending.request(1),
                signal.SIGQUIT: lambda: self._ending.request(2),
                signal.SIGUSR1: lambda: self._loop.post(self._reopen_logs),
                signal.SIGUSR2: lambda: self._loop.post(lambda: log.info("State: %s", self._status())),
            }
        )
        # The guard has them wait until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

    def _on_models_registered(self) -> None:
        self._models_registered = True
        self._announce()

    def _announce(self) -> None:
        """Says that the server has started, once, when it takes requests and its models are registered."""
        if self._ending.failure:
            return
        if self._servers.is_ready and not self._ending.came_up:
            self._ending.came_up = True
            self._guard.say_came_up()
        if self._announced or not self._models_registered or not self._servers.is_ready:
            return
        # What is to be imported once for all workers is a part of the start; what takes its time otherwise is not.
        if not self._batchers.is_ready(warm=bool(self._config.preload_modules)):
            return
        self._announced = True
        with self._registry.changed:
            self._registry.announced = True
            self._held.publisher.routes()
        self._guard.say_started()
        addresses = {"+".join(each.kinds): str(each.address) for each in self._held.listeners}
        self._events.tell("server_started", addresses=addresses)
        say_started([*self._held.listeners, *self._held.grpc_ports], self._held.keys)

    def _turn(self, most_s: float = _IDLE_WAIT_S) -> None:
        """Does what there is to do, after a wait of at most `most_s` seconds."""
        restarting = any(each.child is None for each in self._running())
        wait_s = _BUSY_WAIT_S if restarting or self._registry.draining else _IDLE_WAIT_S
        if not self._loop.turn(min(wait_s, most_s), self._do_what_is_due):
            log.error("It failed again and again within a minute: stopping")
            self._ending.exit_code = 1
            self._ending.request(1)

    def _do_what_is_due(self, now: float) -> None:
        if not self._registry.draining:
            if not self._serves and self._models_registered and not self._registry.is_pending:
                self._serve()
            self._batchers.start_again(now)
            self._servers.start_again(now)
        if now >= self._next_look:
            self._next_look = now + _IDLE_WAIT_S
            self._guard.say_alive()
            self._batchers.kill_hung()
            self._servers.kill_hung()
            self._held.publisher.follow(now)

    def _reopen_logs(self) -> None:
        """Has every process open its log files again: somebody has moved them away."""
        self._log_files.reopen()
        self._batchers.send_all(ReopenLogs())
        self._servers.reopen_logs()

    def _status(self) -> dict[str, Any]:
        return {**self._facts(), "segments": self._batchers.segments.describe(), **self._queries.status()}

    def _facts(self) -> dict[str, Any]:
        """The status without what grows with models, workers and requests."""
        return {
            "version": __version__,
            "torchserve_version": TORCHSERVE_VERSION,
            "data_path": compiled_modules.describe(),
            "pid": self._guard.pid or os.getpid(),
            "uptime_s": int(time.monotonic() - self._started_at),
            "run_dir": str(self._held.directory.path),
            "prefix": self._held.directory.prefix,
            "started": self._announced,
            "healthy": self._registry.is_healthy(time.monotonic()),
            "draining": self._registry.draining,
            "addresses": self._held.addresses,
            "processes": [*self._own_rows(), *(each.describe() for each in self._running())],
            "workflows": self._workflows.status(),
        }

    def _own_rows(self) -> list[dict[str, Any]]:
        own = {"role": "supervisor", "pid": os.getpid(), "state": "running", "starts": self._guard.life}
        guard = {"role": "guard", "pid": self._guard.pid, "state": "running", "starts": 1}
        return [guard, own] if self._guard.pid is not None else [own]

    def _replace(self, command: list[str], config: str, fixed: dict[str, str]) -> None:
        self._registry.refuse_while_draining()
        self._ending.replace(command, config, fixed)

    def _leave(self) -> None:
        """Serves on for `drain_delay`: those who choose among servers get the time to see that this one is leaving.

        From now on it says that it is not ready, and ends each connection with its answer. A second stop request ends
        the wait.
        """
        delay_s = _UPGRADE_DELAY_S if self._ending.is_replaced else self._config.drain_delay
        if not delay_s or self._ending.exit_code or not self._announced or self._ending.requests > 1:
            return
        log.info("Stopping in %g s; until then requests are answered", delay_s)
        with self._registry.changed:
            self._registry.leaving = True
            self._held.publisher.routes()
        until = time.monotonic() + delay_s
        while self._ending.requests < 2 and (left_s := until - time.monotonic()) > 0:
            self._turn(left_s)

    def _drain(self) -> None:
        """Lets requests under way end, then stops web processes and batchers; a second stop request waits no more."""
        self._events.tell("server_stopping")
        log.info("Stopping: requests under way have %d s", self._config.graceful_timeout)
        with self._registry.changed:
            self._registry.draining = True
            self._held.publisher.routes()
            self._registry.changed.notify_all()
        if not self._ending.is_followed:
            # Those who come from now on are refused, by the guard's copies of the sockets, too.
            for listener in (*self._held.listeners, *self._held.grpc_ports):
                self._guard.drop(listener.kept_as)
            self._guard.say_stopping()
            self._held.close_listeners()
        self._servers.stop()
        limit_s = self._config.graceful_timeout + _WEB_MARGIN_S
        self._ending.wait_for(
            self._servers.processes, limit_s, self._turn, lambda child: child.send_signal(signal.SIGQUIT)
        )
        self._batchers.send_all(Stop(drain=self._ending.requests < 2))
        self._ending.wait_for(self._batchers.processes, _BATCHER_STOP_S, self._turn)
        self._snapshots.stop()
        self._sinks_stopped.set()
        self._events.settle(_EVENTS_LIMIT_S)

    def _kill_children(self) -> None:
        """Ends what still runs: after a drain nothing, after a failed start or an error everything."""
        self._registry.draining = True
        children = [each.child for each in self._running() if each.child is not None]
        for child in children:
            child.send_signal(signal.SIGKILL)
        for child in children:
            child.wait(FAST_STOP_S)
            child.close()
        self._batchers.wait_for_workers()

    def _running(self) -> list[SupervisedProcess]:
        """All that is started and watched."""
        return [*self._batchers.processes, *self._servers.processes]
