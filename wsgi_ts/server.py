"""`python -m wsgi_ts.server`: the supervisor, which starts, watches and stops all other processes of an instance.

Its main thread owns every child (a child dies with the thread that started it), the batchers' channels and the
segments' numbers, in one selector loop. Operations on models run on the threads of the control socket; what they
need of the main thread is posted to it. It never touches what is in a segment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION, __version__
from wsgi_ts.batcher import layout
from wsgi_ts.batcher.board import Board, batcher_bell_name
from wsgi_ts.batcher.doorbell import Doorbell
from wsgi_ts.batcher.layout import BatcherWord, ModelWord
from wsgi_ts.batcher.shared_memory import SharedMemoryFull
from wsgi_ts.batcher_link import BatcherLink
from wsgi_ts.channel import ChannelClosed
from wsgi_ts.config import Config, ConfigError
from wsgi_ts.config_dump import configuration_lines
from wsgi_ts.control_server import ControlServer, Peer
from wsgi_ts.errors import BadRequest, InternalServerError, ServerError, ServiceUnavailable
from wsgi_ts.gpu.devices import gpu_count
from wsgi_ts.listeners import BindError, BoundListener, bind_all
from wsgi_ts.log import LogFiles, setup_logging
from wsgi_ts.log_config import LogConfigError, load_plan
from wsgi_ts.log_plan import LogPlan
from wsgi_ts.log_rotation import LogRotation
from wsgi_ts.messages import WorkerReport
from wsgi_ts.metrics.keeper import MetricsKeeper
from wsgi_ts.model_manager import ModelManager
from wsgi_ts.process import Child, enable_fault_traces
from wsgi_ts.registry import ModelVersion, Registry
from wsgi_ts.run_directory import RunDirectory, RunDirectoryError, write_json
from wsgi_ts.segment_keeper import SegmentKeeper
from wsgi_ts.snapshots import SnapshotError, SnapshotWriter, recorded_models
from wsgi_ts.start_checks import (
    StartError,
    check_interpreter,
    check_shared_memory,
    remove_pid_file,
    warn_of_any_url,
)
from wsgi_ts.tls import memory_file
from wsgi_ts.tokens import INFERENCE, MANAGEMENT, KeyFileError, KeyRing
from wsgi_ts.web_tier import Gunicorn, plan_web_tier

# Not __name__: this module is run as __main__.
log = logging.getLogger("wsgi_ts.server")

#: Longest wait of the loop, in seconds; shorter while something is due.
_IDLE_WAIT_S = 1.0
_BUSY_WAIT_S = 0.05
#: How long gunicorn gets on top of `graceful_timeout`, and a batcher to stop, in seconds.
_WEB_MARGIN_S = 4.0
_BATCHER_STOP_S = 3.0
_FAST_STOP_S = 2.0
#: How long an answer waits for the batchers to attach a segment.
_ATTACH_LIMIT_S = 30.0
_MAIN_THREAD_LIMIT_S = 10.0
#: So many errors of the loop within a minute end the supervisor.
_MAX_LOOP_ERRORS = 5
#: Signals that must not end a supervisor; handlers and not SIG_IGN, which the children would inherit.
_IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGALRM, signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU)


class Supervisor:
    """One instance from start to stop: `run` is all of its life."""

    def __init__(self, config: Config, run_dir: Path, log_plan: LogPlan, log_files: LogFiles) -> None:
        """Makes nothing yet.

        Args:
            config: the configuration.
            run_dir: the run directory.
            log_plan: how the instance logs.
            log_files: the open log files.
        """
        self._config = config
        self._run_dir_path = run_dir
        self._log_plan = log_plan
        self._log_files = log_files
        self._registry = Registry(
            config.initial_worker_port, self._clear_counters, config.initial_distribution_port
        )
        self._snapshots = SnapshotWriter(config, self._registry)
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = socket.socketpair()
        self._started_at = time.monotonic()
        self._stop_requests = 0
        self._draining = False
        self._epoch = 0
        self._published_health: bool | None = None
        self._next_look = 0.0
        self._models_registered = False
        self._announced = False
        self._loop_errors: deque[float] = deque(maxlen=_MAX_LOOP_ERRORS)
        self._batchers: list[BatcherLink] = []
        self._web: list[Gunicorn] = []
        self._listeners: list[BoundListener] = []
        self._keys: KeyRing | None = None
        self._tls_fd = -1
        self._exit_code = 0

    def run(self) -> int:
        """Starts everything, serves until a signal or an operation says stop, and leaves nothing behind.

        Returns:
            The exit code.

        Raises:
            StartError: it cannot start (also RunDirectoryError, BindError); nothing is left behind.
        """
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._serve()
            self._drain()
        remove_pid_file()
        log.info("Torchserve stopped.")
        return self._exit_code

    # Start

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Makes everything in order; `stack` undoes it in reverse."""
        self._install_signals()
        try:
            self._recorded = recorded_models(self._config)
        except SnapshotError as error:
            raise StartError(str(error)) from error
        self._dir = RunDirectory.acquire(self._run_dir_path)
        stack.callback(self._dir.release)
        prefix = self._dir.prefix
        gpus = gpu_count(self._config.number_of_gpu)
        for line in configuration_lines(self._config, gpus):
            log.info("%s", line)
        devices = ["cpu", *(f"cuda:{number}" for number in range(gpus))]
        if len(devices) > layout.MAX_BATCHERS:
            raise StartError(f"{gpus} GPUs are more than this server handles; set number_of_gpu")
        check_shared_memory(self._config, len(devices))
        check_interpreter(self._config)
        warn_of_any_url(self._config)
        self._listeners = bind_all(self._config)
        stack.callback(self._close_listeners)
        self._open_certificates(stack)
        self._log_plan.write(self._dir.log_plan_file)
        self._write_config()
        try:
            self._board = Board.create(prefix)
        except SharedMemoryFull as error:
            raise StartError(str(error.strerror)) from error
        stack.callback(self._board.close)
        for index in range(len(devices)):
            Doorbell.create(batcher_bell_name(prefix, index))
        self._metrics = MetricsKeeper(self._config, self._board, self._registry, self._log_files, gpus)
        self._manager = ModelManager(
            self._config,
            self._registry,
            self._dir.models,
            gpus=gpus,
            send=self._send,
            publish=self._publish,
            queued=self._queued,
            record=self._snapshots.record,
        )
        self._publish()
        self._make_keys(stack)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._on_wake)
        self._batchers = [BatcherLink(index, device, prefix) for index, device in enumerate(devices)]
        self._segments = SegmentKeeper(prefix, self._selector, self._batchers)
        control = ControlServer(self._dir.control_socket, self._operations())
        try:
            control.start()
        except OSError as error:
            raise StartError(f"control socket {self._dir.control_socket}: {error}") from error
        stack.callback(control.stop)
        stack.enter_context(self._metrics.running())
        stack.callback(self._kill_children)
        self._start_log_rotation(stack)
        for link in self._batchers:
            self._start_batcher(link)
        self._web = plan_web_tier(self._config, self._listeners)
        for web in self._web:
            self._start_web(web)
        threading.Thread(target=self._register_models, name="startup models", daemon=True).start()

    def _write_config(self) -> None:
        """Writes the configuration for the children, without what is for the supervisor alone."""
        self._dir.config_file.touch(0o600)
        self._dir.config_file.write_text(dataclasses.replace(self._config, keystore_pass="").to_json())

    def _open_certificates(self, stack: contextlib.ExitStack) -> None:
        """Reads and checks what https listeners need, into memory that their gunicorn inherits."""
        if not any(address.is_tls for address in self._config.addresses.values()):
            return
        # Only then: cryptography takes a while to load.
        from wsgi_ts.certificates import CertificateError, load_material

        try:
            self._tls_fd = memory_file(load_material(self._config).to_pem())
        except CertificateError as error:
            raise StartError(str(error)) from error
        stack.callback(os.close, self._tls_fd)

    def _make_keys(self, stack: contextlib.ExitStack) -> None:
        """Makes the tokens and the file that clients take them from, if requests need tokens."""
        if not self._config.token_authorization:
            return
        self._keys = KeyRing(Path.cwd(), self._config.token_expiration_min, self._publish_tokens)
        try:
            self._keys.create()
        except KeyFileError as error:
            raise StartError(str(error)) from error
        stack.callback(self._keys.remove)

    def _start_log_rotation(self, stack: contextlib.ExitStack) -> None:
        began_at = {file.path: file.began_at for file in self._log_files.files}
        rotation = LogRotation(self._log_files.rotations, began_at, lambda: self._post(self._reopen_logs))
        rotation.start()
        stack.callback(rotation.stop)

    def _install_signals(self) -> None:
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        signal.set_wakeup_fd(self._wake_w.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop_signal)
        signal.signal(signal.SIGQUIT, self._on_fast_stop_signal)
        signal.signal(signal.SIGUSR1, lambda *_: self._posted.append(self._reopen_logs))
        signal.signal(signal.SIGUSR2, lambda *_: self._posted.append(self._dump_state))
        for number in (*_IGNORED_SIGNALS, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)):
            signal.signal(number, _ignore)

    def _start_batcher(self, link: BatcherLink) -> None:
        # Under the registry's lock no operation sends anything between the start and what the start has to tell.
        with self._registry.changed:
            threads = len(os.sched_getaffinity(0))
            attachable = self._segments.table.attachable()
            child = link.start(self._dir.path, self._dir.log_plan_file, attachable, threads)
            for message in self._manager.replay(link.index):
                link.send(message)
        self._dir.add_child(child.identity, link.name)
        assert link.channel is not None
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_batcher_death(link))
        self._selector.register(link.channel, selectors.EVENT_READ, lambda: self._on_batcher_event(link))

    def _start_web(self, web: Gunicorn) -> None:
        child = web.start(self._dir.config_file, self._dir.path, self._dir.prefix, self._tls_fd)
        self._dir.add_child(child.identity, web.name)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_web_death(web))
        self._selector.register(web.ready_fd, selectors.EVENT_READ, lambda: self._on_web_ready(web))

    def _register_models(self) -> None:
        """Body of the thread that registers the models of the snapshot, or else those of the configuration."""
        if self._config.model_snapshot is None:
            self._load_models()
        else:
            self._restore_models()
        if not self._draining:
            self._snapshots.start()
            self._post(self._on_models_registered)

    def _load_models(self) -> None:
        for name, url in self._config.load_models:
            if self._draining:
                return
            try:
                self._manager.register(url=url, model_name=name, synchronous=False, at_startup=True)
            except ServerError as error:
                log.error("Failed to load model: %s: %s", url if name is None else name, error.message)
            except Exception:
                log.exception("Failed to load model: %s", url if name is None else name)

    def _restore_models(self) -> None:
        if not self._recorded:
            log.warning("Model snapshot is empty. Starting TorchServe without initial models.")
        log.info(
            "Restoring %d model versions from the snapshot %s%s; start with --ncs to begin without it",
            len(self._recorded),
            self._config.config_file,
            f"; not loading {self._config.initial_models}" if self._config.load_models else "",
        )
        for model in self._recorded:
            if self._draining:
                return
            try:
                self._manager.restore(model)
            except ServerError as error:
                self._snapshots.keep(model)
                log.error("Error while registering model. Details: %s %s: %s", model.name, model.version, error.message)
            except Exception:
                self._snapshots.keep(model)
                log.exception("Error while registering model. Details: %s %s", model.name, model.version)

    # The loop

    def _serve(self) -> None:
        while not self._stop_requests:
            self._turn()

    def _turn(self) -> None:
        """Waits for something to happen, and does what it asks for."""
        try:
            for key, _ in self._selector.select(self._wait_s()):
                # One event may have closed what the next one is about.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            while self._posted:
                self._posted.popleft()()
            self._do_what_is_due(time.monotonic())
        except Exception:
            log.exception("The supervisor's loop failed")
            now = time.monotonic()
            self._loop_errors.append(now)
            if len(self._loop_errors) == _MAX_LOOP_ERRORS and now - self._loop_errors[0] < 60:
                log.error("It failed %d times within a minute: stopping", _MAX_LOOP_ERRORS)
                self._exit_code = 1
                self._stop_requests += 1

    def _wait_s(self) -> float:
        if self._posted:
            return 0.0
        restarting = any(each.child is None for each in self._running())
        return _BUSY_WAIT_S if restarting or self._draining else _IDLE_WAIT_S

    def _do_what_is_due(self, now: float) -> None:
        if not self._draining:
            for link in self._batchers:
                if link.child is None and link.workers_are_gone(now) and now >= link.restart_at:
                    link.remove_mailboxes()
                    self._start_batcher(link)
                    log.info("%s started again, life %d", link.name, link.epoch)
            for web in self._web:
                if web.child is None and now >= web.restart_at:
                    self._start_web(web)
                    log.info("%s started again", web.name)
        if now < self._next_look:
            return
        self._next_look = now + _IDLE_WAIT_S
        for link in self._batchers:
            heartbeat = self._board.words[self._board.batcher_row(link.index) + BatcherWord.HEARTBEAT_NS]
            if link.child is not None and link.is_hung(heartbeat):
                log.error("%s (pid %d) does not answer any more and is killed", link.name, link.child.pid)
                link.child.send_signal(signal.SIGKILL)
        if self._registry.is_healthy(now) != self._published_health:
            self._publish()

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_r.recv(4096):
                pass

    def _post(self, action: Callable[[], None]) -> None:
        """Has the main thread do something."""
        self._posted.append(action)
        # A full buffer means that it is being woken already.
        with contextlib.suppress(OSError):
            self._wake_w.send(b"\0")

    def _on_main_thread(self, action: Callable[[], Any]) -> Any:
        """Has the main thread do something, and waits for the result."""
        future: Future[Any] = Future()

        def carry_out() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        self._post(carry_out)
        try:
            return future.result(_MAIN_THREAD_LIMIT_S)
        except TimeoutError as error:
            raise ServiceUnavailable("The server is busy. Please try again in a few seconds.") from error

    # Batchers

    def _send(self, batcher: int, message: dict[str, Any]) -> None:
        self._batchers[batcher].send(message)

    def _on_batcher_event(self, link: BatcherLink) -> None:
        assert link.channel is not None
        try:
            events = link.channel.receive_ready()
        except (ChannelClosed, ValueError) as error:
            # Its pidfd tells the rest. A batcher that closed its channel and lives on is of no use.
            self._selector.unregister(link.channel)
            if link.child is not None and not self._draining:
                log.debug("%s closed its channel: %s", link.name, error)
                link.child.send_signal(signal.SIGKILL)
            return
        for event in events:
            kind = event["event"]
            if kind == "started":
                log.info("%s started", link.name)
            elif kind == "segment_attached":
                self._segments.table.attached(event["index"], link.index)
            elif kind == "segment_retired":
                self._segments.table.retired(event["index"], link.index)
            elif kind == "worker":
                report = WorkerReport.from_dict(event["report"])
                self._metrics.worker_reported(report)
                with self._registry.changed:
                    if self._registry.apply_report(link.index, report):
                        self._publish()
            elif kind == "metrics":
                self._metrics.take_updates(event["updates"])
            elif kind == "model_unloaded":
                self._manager.model_unloaded(link.index, event["model_index"])

    def _on_batcher_death(self, link: BatcherLink) -> None:
        assert link.child is not None
        assert link.channel is not None
        pid = link.child.pid
        self._selector.unregister(link.child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(link.channel)
        with self._registry.changed:
            reason = link.died(time.monotonic())
            self._registry.batcher_lost(link.index)
        self._dir.remove_child(pid)
        self._segments.table.batcher_lost(link.index)
        if not self._draining:
            log.error("%s (pid %d) has ended (%s) and is started again", link.name, pid, reason)
            self._publish()

    # Gunicorn

    def _on_web_death(self, web: Gunicorn) -> None:
        assert web.child is not None
        pid = web.child.pid
        self._selector.unregister(web.child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(web.ready_fd)
        reason = web.died(time.monotonic())
        self._dir.remove_child(pid)
        if not self._draining:
            log.error("%s (pid %d) has ended (%s) and is started again", web.name, pid, reason)

    def _on_web_ready(self, web: Gunicorn) -> None:
        if not web.take_ready():
            self._selector.unregister(web.ready_fd)
        self._announce()

    def _on_models_registered(self) -> None:
        self._models_registered = True
        self._announce()

    def _announce(self) -> None:
        """Says that the server has started, once, when it takes requests and its models are registered."""
        ready = self._models_registered and all(web.is_ready for web in self._web)
        if ready and not self._announced:
            self._announced = True
            for listener in self._listeners:
                log.info("%s API listens on %s", " and ".join(listener.kinds).capitalize(), listener.address)
                if not listener.address.is_local and not self._config.token_authorization:
                    log.warning(
                        "disable_token_authorization=true: %s answers everybody who can reach it%s",
                        listener.address,
                        "; who manages models runs code here" if "management" in listener.kinds else "",
                    )
            if self._keys is not None:
                log.info(
                    "Token authorization is on: requests need \"Authorization: Bearer TOKEN\" with a token of %s",
                    self._keys.path,
                )
            log.info("Model server started.")

    # What the control socket offers

    def _operations(self) -> dict[str, Callable[[Peer, dict[str, Any]], Any]]:
        manager = self._manager
        return {
            "register_model": lambda _, arguments: manager.register(**arguments),
            "scale_model": lambda _, arguments: manager.scale(**arguments),
            "describe_model": lambda _, arguments: manager.describe(**arguments),
            "list_models": lambda _, arguments: manager.list_models(**arguments),
            "set_default": lambda _, arguments: manager.set_default(**arguments),
            "unregister_model": lambda _, arguments: manager.unregister(**arguments),
            "renew_token": self._op_renew_token,
            "kserve_ready": lambda _, arguments: manager.kserve_ready(**arguments),
            "new_segment": self._op_new_segment,
            "segment_ready": self._op_segment_ready,
            "status": lambda _, arguments: self._on_main_thread(self._status),
            "metrics": lambda _, arguments: self._metrics.text(**arguments),
            "stop": self._op_stop,
        }

    def _op_new_segment(self, peer: Peer, arguments: dict[str, Any]) -> Any:
        if arguments["pid"] != peer.pid:
            raise BadRequest("A process asks for its own segment only.")
        if self._draining:
            raise ServiceUnavailable("The server is stopping.")
        return self._on_main_thread(lambda: self._segments.new(peer.pid))

    def _op_segment_ready(self, peer: Peer, arguments: dict[str, Any]) -> Any:
        attached = threading.Event()
        self._on_main_thread(lambda: self._segments.ready(arguments["index"], peer.pid, attached.set))
        if not attached.wait(_ATTACH_LIMIT_S):
            raise InternalServerError("The batchers did not attach the segment in time.")
        return {}

    def _op_renew_token(self, peer: Peer, arguments: dict[str, Any]) -> Any:
        scope = arguments["scope"]
        if self._keys is None or scope not in (MANAGEMENT, INFERENCE):
            raise BadRequest("There is no such token.")
        try:
            self._keys.renew(scope)
        except KeyFileError as error:
            log.error("%s", error)
            raise InternalServerError("The new token could not be written; the old one still counts.") from error
        return {}

    def _op_stop(self, peer: Peer, arguments: dict[str, Any]) -> Any:
        count = 2 if arguments.get("fast") else 1

        def request_stop() -> None:
            self._stop_requests += count

        log.info("Process %d asks for a stop", peer.pid)
        self._post(request_stop)
        return {}

    def _status(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "torchserve_version": TORCHSERVE_VERSION,
            "pid": os.getpid(),
            "uptime_s": int(time.monotonic() - self._started_at),
            "run_dir": str(self._dir.path),
            "prefix": self._dir.prefix,
            "started": self._announced,
            "healthy": self._registry.is_healthy(time.monotonic()),
            "draining": self._draining,
            "addresses": {"+".join(each.kinds): str(each.address) for each in self._listeners},
            "processes": [each.describe() for each in self._running()],
            "segments": self._segments.describe(),
            **self._manager.status(),
        }

    def _clear_counters(self, model_index: int) -> None:
        self._board.clear_model(model_index)

    def _queued(self, model: ModelVersion) -> int:
        words = self._board.words
        rows = [self._board.model_row(batcher, model.spec.index) for batcher in model.loaded_in]
        return sum(words[row + ModelWord.QUEUED] for row in rows)

    def _publish(self) -> None:
        """Makes the registry's state known to the data path."""
        with self._registry.changed:
            self._epoch += 1
            routes = self._registry.routes(self._epoch, time.monotonic())
            self._published_health = routes["healthy"]
            write_json(self._dir.routes_file, routes)
            self._board.bump_epoch()

    def _publish_tokens(self, keys: dict[str, Any]) -> None:
        """Makes known what tokens are checked by; once this returns, nobody accepts what it replaced."""
        write_json(self._dir.tokens_file, keys)
        self._board.bump_token_epoch()

    # Signals

    def _on_stop_signal(self, number: int, frame: Any) -> None:
        self._stop_requests += 1

    def _on_fast_stop_signal(self, number: int, frame: Any) -> None:
        self._stop_requests += 2

    def _reopen_logs(self) -> None:
        """Has every process open its log files again: somebody has moved them away."""
        self._log_files.reopen()
        for link in self._batchers:
            link.send({"op": "reopen_logs"})
        for web in self._web:
            web.reopen_logs()

    def _dump_state(self) -> None:
        log.info("State: %s", self._status())

    # Stop

    def _drain(self) -> None:
        """Lets requests under way end, then stops gunicorn and the batchers; a second stop request waits no more."""
        log.info("Stopping: requests under way have %d s", self._config.graceful_timeout)
        with self._registry.changed:
            self._draining = True
            self._registry.draining = True
            self._publish()
            self._registry.changed.notify_all()
        self._close_listeners()
        for web in self._web:
            if web.child is not None:
                web.child.send_signal(signal.SIGTERM)
        limit_s = self._config.graceful_timeout + _WEB_MARGIN_S
        self._wait_for([*self._web], limit_s, lambda child: child.send_signal(signal.SIGQUIT))
        for link in self._batchers:
            link.send({"op": "stop", "drain": self._stop_requests < 2})
        self._wait_for([*self._batchers], _BATCHER_STOP_S, lambda child: None)
        self._snapshots.stop()

    def _wait_for(
        self, running: Sequence[BatcherLink | Gunicorn], limit_s: float, hasten: Callable[[Child], None]
    ) -> None:
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
        self._draining = True
        children = [each.child for each in self._running() if each.child is not None]
        for child in children:
            child.send_signal(signal.SIGKILL)
        for child in children:
            child.wait(_FAST_STOP_S)
            child.close()
        for link in self._batchers:
            deadline = time.monotonic() + _FAST_STOP_S
            while not link.workers_are_gone(time.monotonic()) and time.monotonic() < deadline:
                time.sleep(_BUSY_WAIT_S)

    def _running(self) -> list[BatcherLink | Gunicorn]:
        """All that is started and watched."""
        return [*self._batchers, *self._web]

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()


def _ignore(number: int, frame: Any) -> None:
    """A signal that is not for us."""


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.server", description=__doc__)
    parser.add_argument("--config-json", type=Path, required=True, help="read once, then removed")
    parser.add_argument("--run-dir", type=Path, help="default: the one in the configuration")
    parser.add_argument("--foreground-marker", action="store_true", help="no effect")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one instance; returns its exit code."""
    enable_fault_traces()
    options = _parse_arguments(arguments)
    try:
        config = Config.from_json(options.config_json.read_text(encoding="utf-8"))
        options.config_json.unlink()
    except (OSError, ConfigError) as error:
        print(f"{options.config_json}: {error}", file=sys.stderr)
        return 1
    try:
        log_plan = load_plan(
            config.log_dir,
            config.metrics_dir,
            config.log_config,
            os.environ,
            asynchronous=config.async_logging,
        )
        log_files = setup_logging(log_plan)
    except (LogConfigError, ValueError) as error:
        # Of dictConfig's errors the outer one names the handler and the inner one says why.
        print(f"{error}: {error.__cause__}" if error.__cause__ else error, file=sys.stderr, flush=True)
        return 1
    for warning in config.warnings:
        log.info("Configuration: %s", warning)
    if log_plan.notes:
        log.warning("%s: left out, has no counterpart here: %s", config.log_config, ", ".join(log_plan.notes))
    try:
        return Supervisor(config, options.run_dir or config.run_dir, log_plan, log_files).run()
    except (StartError, RunDirectoryError, BindError) as error:
        log.error("%s", error)
        print(error, file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
