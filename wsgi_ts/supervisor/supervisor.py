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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION, __version__, compiled_modules
from wsgi_ts.batcher.shm import layout
from wsgi_ts.checks.start import StartError, check_configuration, check_machine, check_run_directory
from wsgi_ts.control.server import ControlServer
from wsgi_ts.errors import BadRequest
from wsgi_ts.gpu.devices import gpu_count
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.guard.protocol import FORWARDED, LOCK, MODELS
from wsgi_ts.instance.listeners import bind_all, bind_grpc
from wsgi_ts.instance.pid_file import remove_pid_file
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.messages import ReopenLogs, Stop, ToBatcher
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.recorded import SnapshotError
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.reloading import Reloader
from wsgi_ts.models.snapshots import SnapshotWriter
from wsgi_ts.models.startup import ModelsToStart, StartupModels, models_to_start
from wsgi_ts.plugins.events import Events
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.process import Child
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.batchers import Batchers
from wsgi_ts.supervisor.child import Owner, SupervisedProcess
from wsgi_ts.supervisor.config_dump import configuration_lines
from wsgi_ts.supervisor.loop import MainLoop
from wsgi_ts.supervisor.metrics.collector import MetricsCollector
from wsgi_ts.supervisor.metrics.sinks import start_sinks
from wsgi_ts.supervisor.operations import ControlOperations
from wsgi_ts.supervisor.publisher import Publisher
from wsgi_ts.supervisor.servers import Servers, make_servers
from wsgi_ts.supervisor.start import (
    fetchers,
    make_board,
    make_keys,
    open_certificates,
    say_plugins,
    say_started,
    snapshot_store,
    start_log_rotation,
    write_for_children,
)
from wsgi_ts.supervisor.worker_events import WorkerEvents
from wsgi_ts.workflows.manager import WorkflowManager
from wsgi_ts.workflows.startup import StartupWorkflows

log = logging.getLogger(__name__)

#: Longest wait of the loop, in seconds; shorter while something is due.
_IDLE_WAIT_S = 1.0
_BUSY_WAIT_S = 0.05
#: How long gunicorn gets on top of `graceful_timeout`, and a batcher to stop, in seconds.
_WEB_MARGIN_S = 4.0
_BATCHER_STOP_S = 3.0
_FAST_STOP_S = 2.0
#: At an upgrade, how long connections that are in use get to end with an answer, in seconds.
_UPGRADE_DELAY_S = 1.0
#: How long plugins may take to hear the last events, in seconds.
_EVENTS_LIMIT_S = 1.0


class Supervisor:
    """One instance from start to stop: `run` is all of its life.

    Args:
        guard: the process that has started this one, and starts the next when it dies.
    """

    def __init__(self, config: Config, guard: GuardLink, run_dir: Path, log_plan: LogPlan, log_files: LogFiles) -> None:
        self._config = config
        self._guard = guard
        self._run_dir_path = run_dir
        self._log_plan = log_plan
        self._log_files = log_files
        self._started_at = time.monotonic()
        self._loop = MainLoop()
        self._stop_requests = 0
        self._next_look = 0.0
        self._models_registered = False
        self._came_up = False
        self._serves = False
        self._is_replaced = False
        self._announced = False
        self._exit_code = 0
        self._sinks_stopped = threading.Event()
        self._failure = ""

    def run(self) -> int:
        """Starts everything, serves until a signal or an operation says stop, and leaves nothing behind.

        Returns:
            The exit code.

        Raises:
            StartError: it cannot start (also RunDirectoryError, BindError); nothing is left behind.
        """
        with contextlib.ExitStack() as stack:
            self._start(stack)
            while not self._stop_requests:
                self._turn()
            if self._failure:
                raise StartError(self._failure)
            self._leave()
            self._drain()
        if not self._exit_code and not self._is_replaced:
            remove_pid_file(self._guard.pid or os.getpid())
        log.info("Torchserve stopped.")
        return self._exit_code

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
        self._dir = RunDirectory.acquire(
            self._run_dir_path, lock_fd=self._guard.kept.get(LOCK), owner_pid=self._guard.pid
        )
        self._guard.keep(LOCK, self._dir.lock_fd)
        stack.callback(lambda: self._dir.release(for_good=not self._is_followed))
        gpus = gpu_count(config.number_of_gpu)
        for line in configuration_lines(config, gpus):
            log.info("%s", line)
        say_plugins(config)
        log.info("Data path: %s", compiled_modules.describe())
        devices = ["cpu", *(f"cuda:{number}" for number in range(gpus))]
        if len(devices) > layout.MAX_BATCHERS:
            raise StartError(f"{gpus} GPUs are more than this server handles; set number_of_gpu")
        check_configuration(config, len(devices))
        self._listeners = bind_all(config, self._guard.kept)
        stack.callback(self._close_listeners)
        self._grpc_ports = bind_grpc(config, self._guard.kept)
        for port in self._grpc_ports:
            stack.callback(port.close)
        for listener in (*self._listeners, *self._grpc_ports):
            self._guard.keep(listener.kept_as, listener.sock.fileno())
        tls_fd = open_certificates(config, stack)
        write_for_children(config, self._log_plan, self._dir)
        self._board = make_board(self._dir.prefix, len(devices), stack)
        self._registry = Registry(
            config.initial_worker_port,
            self._board.clear_model,
            config.initial_distribution_port,
            self._board.clear_workflow,
        )
        self._publisher = Publisher(self._registry, self._board, self._dir)
        self._publisher.routes()
        self._keys = make_keys(config, self._publisher.tokens, self._guard, stack)
        self._plugins = PluginReport(self._dir.path, "supervisor")
        stack.callback(self._plugins.close)
        self._put_together(devices, tls_fd)
        self._start_all(models, stack)

    def _put_together(self, devices: Sequence[str], tls_fd: int) -> None:
        """Makes the parts that serve, of which nothing runs yet."""
        config = self._config
        gpus = len(devices) - 1
        self._metrics = MetricsCollector(config, self._board, self._registry, self._log_files, gpus, self._dir.path)
        self._events = Events(config, self._plugins)
        self._snapshots = SnapshotWriter(
            config,
            self._registry,
            lambda models: self._guard.keep_json(MODELS, models),
            snapshot_store(config, self._plugins),
        )
        self._manager = ModelManager(
            config,
            self._registry,
            self._dir.models,
            gpus=gpus,
            send=self._send,
            publish=self._publisher.routes,
            queued=lambda model: self._board.queued(model.loaded_in, model.spec.index),
            record=self._snapshots.record,
            events=self._events,
            fetchers=fetchers(config, self._plugins),
        )
        self._workflows = WorkflowManager(
            config,
            self._registry,
            self._manager,
            self._dir.models,
            publish=self._publisher.routes,
            outstanding=lambda model: self._board.outstanding(model.loaded_in, model.spec.index),
            record=self._snapshots.record,
        )
        owner = Owner(self._loop, self._dir, self._registry, on_ready=self._announce, on_failure=self._fail)
        self._batchers = Batchers(
            devices,
            owner,
            board=self._board,
            manager=self._manager,
            metrics=self._metrics,
            events=WorkerEvents(self._events, self._registry),
            publish=self._publisher.routes,
        )
        self._servers = Servers(
            make_servers(config, self._listeners, self._grpc_ports, self._dir, tls_fd),
            owner,
        )
        operations = ControlOperations(
            loop=self._loop,
            registry=self._registry,
            manager=self._manager,
            workflows=self._workflows,
            metrics=self._metrics,
            segments=self._batchers.segments,
            keys=self._keys,
            status=self._status,
            stop=self._request_stop,
            replace=self._replace,
        )
        self._control = ControlServer(self._dir.control_socket, operations.table())

    def _start_all(self, first: ModelsToStart, stack: contextlib.ExitStack) -> None:
        """Starts threads and processes, and the registering of the models."""
        try:
            self._control.start()
        except OSError as error:
            raise StartError(f"control socket {self._dir.control_socket}: {error}") from error
        stack.callback(self._control.stop)
        stack.enter_context(self._metrics.running())
        start_sinks(self._config, self._metrics.families, self._plugins, self._sinks_stopped)
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
        workflows = StartupWorkflows(self._config, first, self._registry, self._workflows, self._publisher.routes)
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

    def _install_signals(self) -> None:
        self._loop.handle_signals(
            {
                signal.SIGTERM: lambda: self._request_stop(1),
                signal.SIGINT: lambda: self._request_stop(1),
                signal.SIGQUIT: lambda: self._request_stop(2),
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
        if self._failure:
            return
        if self._servers.is_ready and not self._came_up:
            self._came_up = True
            self._guard.say_came_up()
        if self._announced or not self._models_registered or not self._servers.is_ready:
            return
        # What is to be imported once for all workers is a part of the start; what takes its time otherwise is not.
        if not self._batchers.is_ready(warm=bool(self._config.preload_modules)):
            return
        self._announced = True
        with self._registry.changed:
            self._registry.announced = True
            self._publisher.routes()
        self._guard.say_started()
        addresses = {"+".join(each.kinds): str(each.address) for each in self._listeners}
        self._events.tell("server_started", addresses=addresses)
        say_started([*self._listeners, *self._grpc_ports], self._keys)

    def _turn(self, most_s: float = _IDLE_WAIT_S) -> None:
        """Does what there is to do, after a wait of at most `most_s` seconds."""
        restarting = any(each.child is None for each in self._running())
        wait_s = _BUSY_WAIT_S if restarting or self._registry.draining else _IDLE_WAIT_S
        if not self._loop.turn(min(wait_s, most_s), self._do_what_is_due):
            log.error("It failed again and again within a minute: stopping")
            self._exit_code = 1
            self._request_stop(1)

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
            self._publisher.follow(now)

    def _send(self, batcher: int, message: ToBatcher) -> None:
        self._batchers.send(batcher, message)

    def _reopen_logs(self) -> None:
        """Has every process open its log files again: somebody has moved them away."""
        self._log_files.reopen()
        self._batchers.send_all(ReopenLogs())
        self._servers.reopen_logs()

    def _status(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "torchserve_version": TORCHSERVE_VERSION,
            "data_path": compiled_modules.describe(),
            "pid": self._guard.pid or os.getpid(),
            "uptime_s": int(time.monotonic() - self._started_at),
            "run_dir": str(self._dir.path),
            "prefix": self._dir.prefix,
            "started": self._announced,
            "healthy": self._registry.is_healthy(time.monotonic()),
            "draining": self._registry.draining,
            "addresses": {
                **{"+".join(each.kinds): str(each.address) for each in self._listeners},
                **{f"gRPC {each.kinds[0]}": str(each.address) for each in self._grpc_ports},
            },
            "processes": [*self._own_rows(), *(each.describe() for each in self._running())],
            "segments": self._batchers.segments.describe(),
            **self._manager.status(),
        }

    def _own_rows(self) -> list[dict[str, Any]]:
        own = {"role": "supervisor", "pid": os.getpid(), "state": "running", "starts": self._guard.life}
        guard = {"role": "guard", "pid": self._guard.pid, "state": "running", "starts": 1}
        return [guard, own] if self._guard.pid is not None else [own]

    def _fail(self, reason: str) -> None:
        """Ends the instance at its start, since one of its processes has never worked and never will."""
        if self._guard.life > 1 and not self._guard.is_trial:
            # The configuration is the one with which the supervisor before has served.
            log.error("%s", reason)
            return
        self._failure = self._failure or reason
        if not self._guard.is_trial:
            self._guard.say_stopping()
        self._request_stop(1)

    @property
    def _is_followed(self) -> bool:
        """Whether the guard starts another supervisor when this one ends now."""
        if self._is_replaced or (self._guard.is_trial and not self._came_up and self._failure):
            return True
        asked_for = bool(self._stop_requests) and not self._exit_code
        return self._guard.pid is not None and not asked_for and (self._came_up or self._guard.life > 1)

    def _replace(self, command: list[str], config: str, fixed: dict[str, str]) -> None:
        """Ends this supervisor, so that the guard starts another program, or the same with another configuration.

        Args:
            command: the next supervisor's, without what the guard adds.
            config: its configuration, as JSON. It is not read here: a later version may have other keys.
            fixed: `Config.fixed` of it.

        Raises:
            BadRequest: it cannot take this one's place.
        """
        self._registry.refuse_while_draining()
        for key in sorted(fixed.keys() | self._config.fixed.keys()):
            is_now, would_be = self._config.fixed.get(key, "none"), fixed.get(key, "none")
            if is_now != would_be:
                raise BadRequest(
                    f"An upgrade cannot change {key} ({is_now} now, {would_be} then); stop the server first."
                )
        if self._guard.pid is None or not self._guard.replace(command, config):
            raise BadRequest("There is no guard that could start the next server.")
        self._is_replaced = True
        self._stop_requests += 1

    def _request_stop(self, count: int) -> None:
        if self._is_replaced:
            # Nobody follows any more.
            self._is_replaced, self._stop_requests = False, 0
            self._guard.say_stopping()
        self._stop_requests += count

    def _leave(self) -> None:
        """Serves on for `drain_delay`: those who choose among servers get the time to see that this one is leaving.

        From now on it says that it is not ready, and ends each connection with its answer. A second stop request ends
        the wait.
        """
        delay_s = _UPGRADE_DELAY_S if self._is_replaced else self._config.drain_delay
        if not delay_s or self._exit_code or not self._announced or self._stop_requests > 1:
            return
        log.info("Stopping in %g s; until then requests are answered", delay_s)
        with self._registry.changed:
            self._registry.leaving = True
            self._publisher.routes()
        until = time.monotonic() + delay_s
        while self._stop_requests < 2 and (left_s := until - time.monotonic()) > 0:
            self._turn(left_s)

    def _drain(self) -> None:
        """Lets requests under way end, then stops web processes and batchers; a second stop request waits no more."""
        self._events.tell("server_stopping")
        log.info("Stopping: requests under way have %d s", self._config.graceful_timeout)
        with self._registry.changed:
            self._registry.draining = True
            self._publisher.routes()
            self._registry.changed.notify_all()
        if not self._is_followed:
            # Those who come from now on are refused, by the guard's copies of the sockets, too.
            for listener in (*self._listeners, *self._grpc_ports):
                self._guard.drop(listener.kept_as)
            self._guard.say_stopping()
            self._close_listeners()
        self._servers.stop()
        limit_s = self._config.graceful_timeout + _WEB_MARGIN_S
        self._wait_for(self._servers.processes, limit_s, lambda child: child.send_signal(signal.SIGQUIT))
        self._batchers.send_all(Stop(drain=self._stop_requests < 2))
        self._wait_for(self._batchers.processes, _BATCHER_STOP_S, lambda child: None)
        self._snapshots.stop()
        self._sinks_stopped.set()
        self._events.settle(_EVENTS_LIMIT_S)

    def _wait_for(self, running: Sequence[SupervisedProcess], limit_s: float, hasten: Callable[[Child], None]) -> None:
        """Waits for processes to end, and kills those that have not when the time is over.

        Args:
            running: who was told to stop.
            limit_s: how long that may take, in seconds; less from a second stop request on.
            hasten: told to each of them on a second stop request.
        """
        deadline = time.monotonic() + limit_s
        hastened = False
        while left := [each.child for each in running if each.child is not None]:
            now = time.monotonic()
            if self._stop_requests > 1 and not hastened:
                hastened = True
                deadline = min(deadline, now + _FAST_STOP_S)
                for child in left:
                    hasten(child)
            if now >= deadline:
                for child in left:
                    log.warning("%s (pid %d) did not stop in time and is killed", child.role, child.pid)
                    child.send_signal(signal.SIGKILL)
                deadline = now + _FAST_STOP_S
            self._turn()

    def _kill_children(self) -> None:
        """Ends what still runs: after a drain nothing, after a failed start or an error everything."""
        self._registry.draining = True
        children = [each.child for each in self._running() if each.child is not None]
        for child in children:
            child.send_signal(signal.SIGKILL)
        for child in children:
            child.wait(_FAST_STOP_S)
            child.close()
        self._batchers.wait_for_workers()

    def _running(self) -> list[SupervisedProcess]:
        """All that is started and watched."""
        return [*self._batchers.processes, *self._servers.processes]

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
