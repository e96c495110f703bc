"""The batcher: the process that owns one device.

Two threads: the hot loop (`scheduler.loop.BatcherLoop`), and this control thread, which listens to the supervisor and
the worker template, keeps the right model workers alive (`pool.pool.WorkerPool`) and tells the loop what it must know.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

from wsgi_ts import messages
from wsgi_ts.batcher.batching_plugins import BatchingPlugins
from wsgi_ts.batcher.pool.actions import Action, StartTemplate, StartWorker, WorkerGone, WorkerReady
from wsgi_ts.batcher.pool.pool import WorkerPool
from wsgi_ts.batcher.scheduler import loop
from wsgi_ts.batcher.scheduler.loop import BatcherLoop
from wsgi_ts.batcher.scheduler.model_queue import Worker, largest_batch
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import BatcherWord
from wsgi_ts.batcher.shm.mailbox import BatcherMailbox, mailbox_name
from wsgi_ts.batcher.spawn.environment import worker_environment
from wsgi_ts.control.channel import Channel, ChannelClosed
from wsgi_ts.control.codec import FROM_BATCHER, FROM_TEMPLATE, TO_BATCHER, TO_TEMPLATE
from wsgi_ts.logs.output import flush_outputs
from wsgi_ts.logs.setup import STDERR_VARIABLE, LogFiles, logged_stderr
from wsgi_ts.process import python_command
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config
from wsgi_ts.tracing.options import TraceOptions

log = logging.getLogger(__name__)

_LONGEST_SELECT_S = 1.0
_STOP_LIMIT_S = 10.0
#: Jobs and batches hold no cycles: the collector need not look often.
_GC_THRESHOLD = 50_000
#: So many worker templates may end before one has been ready.
_TEMPLATE_LIVES = 3


class Batcher:
    """The control thread of a batcher."""

    def __init__(self, options: argparse.Namespace, log_files: LogFiles) -> None:
        self._options = options
        self._log_files = log_files
        self._files = RunFiles(options.run_dir)
        self._config = Config.from_json(self._files.config.read_text(encoding="utf-8"))
        self._traces = TraceOptions.of(self._config, options.run_dir)
        self._board = Board.attach(options.prefix)
        self._batching = BatchingPlugins(self._config, options.run_dir, self._board, options.index)
        self._supervisor = Channel(socket.socket(fileno=options.control_fd))
        #: To the worker template and, where modules are preloaded, the warm one: the last forks workers that need them.
        self._templates: list[Channel] = []
        self._template_process: subprocess.Popen[bytes] | None = None
        self._template_worked = False
        self._template_failures = 0
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._notices: deque[loop.Notice] = deque()
        self._pool = WorkerPool()
        self._wanted: dict[int, int] = {}
        self._mailboxes: dict[tuple[int, int], BatcherMailbox] = {}
        self._loop = BatcherLoop(self._board, options.index, self._notice)
        self._thread = threading.Thread(target=self._run_loop, name="loop")
        self._stopping = False
        self._stop_at = math.inf

    def run(self) -> int:
        """Serves until the supervisor says stop, or is gone; returns the exit code."""
        self._board.words[self._board.batcher_row(self._options.index) + BatcherWord.LIVES] += 1
        for index in filter(None, self._options.segments.split(",")):
            self._loop.command(messages.AttachSegment(int(index)))
        self._thread.start()
        self._selector.register(self._supervisor, selectors.EVENT_READ, self._from_supervisor)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._from_loop)
        self._tell_supervisor(messages.BatcherStarted())
        self._carry_out(self._pool.start(time.monotonic()))
        try:
            while not (self._stopping and (self._pool.idle or time.monotonic() >= self._stop_at)):
                self._turn()
        except ChannelClosed:
            log.info("The supervisor has gone; this batcher leaves.")
        finally:
            self._loop.command(messages.Stop())
            self._thread.join()
            self._end_template()
        return 0

    def _turn(self) -> None:
        wait = min(self._pool.next_wake_at - time.monotonic(), _LONGEST_SELECT_S)
        for key, _ in self._selector.select(max(0.0, wait)):
            key.data()
        self._carry_out(self._pool.tick(time.monotonic()))
        if not self._thread.is_alive():
            raise RuntimeError("the batcher's loop has ended")

    def _run_loop(self) -> None:
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        try:
            # Not in the loop's module, which may be compiled: only the interpreter lets the control thread run, too.
            while self._loop.is_running:
                self._loop.turn()
                self._loop.sleep()
        except Exception:
            # A broken loop must not go on with half a state: the supervisor starts the next batcher, which sorts out
            # what lies in the segments.
            log.exception("The batcher's loop failed; this batcher leaves and is started again.")
            flush_outputs()
            os._exit(1)

    def _from_supervisor(self) -> None:
        for message in self._supervisor.receive_messages(TO_BATCHER, "the supervisor"):
            self._take(message, time.monotonic())

    def _take(self, message: messages.ToBatcher, now: float) -> None:
        match message:
            case messages.AttachSegment() | messages.RetireSegment():
                self._loop.command(message)
            case messages.LoadModel(spec):
                self._pool.set_model(spec)
                self._loop.command(loop.TakeModel(spec, self._batching.queue_for(spec)))
            case messages.SetWorkers(index, workers, replaced):
                self._wanted[index] = len(workers) - replaced
                self._carry_out(self._pool.set_workers(index, workers, now))
            case messages.UnloadModel(index):
                self._wanted.pop(index, None)
                self._loop.command(message)
                self._carry_out(self._pool.remove_model(index, now))
            case messages.ReopenLogs():
                self._log_files.reopen()
                self._tell_templates(message, self._templates)
            case messages.Stop(drain):
                self._stopping = True
                self._stop_at = now + (_STOP_LIMIT_S if drain else 0.0)
                self._carry_out(self._pool.stop(now))

    def _tell_supervisor(self, message: messages.FromBatcher) -> None:
        self._supervisor.send(FROM_BATCHER.encode(message))

    def _notice(self, notice: loop.Notice) -> None:
        self._notices.append(notice)
        os.eventfd_write(self._wake_fd, 1)

    def _from_loop(self) -> None:
        os.eventfd_read(self._wake_fd)
        while self._notices:
            now = time.monotonic()
            match notice := self._notices.popleft():
                case messages.SegmentAttached() | messages.SegmentRetired():
                    self._tell_supervisor(notice)
                case messages.WorkerReleased(worker_id, start_count):
                    self._carry_out(self._pool.worker_released(worker_id, start_count, now))
                case messages.KillWorker(worker_id, start_count):
                    self._carry_out(self._pool.worker_timed_out(worker_id, start_count, now))

    def _from_template(self, template: Channel) -> None:
        if template not in self._templates:
            return
        try:
            events = template.receive_messages(FROM_TEMPLATE, "the worker template")
        except ChannelClosed:
            self._end_template()
            self._template_failures += not self._template_worked
            if self._template_failures == _TEMPLATE_LIVES and not self._template_worked:
                self._tell_supervisor(messages.TemplateFailed())
            self._carry_out(self._pool.on_template_lost(time.monotonic()))
            return
        for event in events:
            if isinstance(event, messages.TemplateReady | messages.MetricsReported):
                self._tell_supervisor(event)
            if isinstance(event, messages.TemplateReady):
                self._template_worked = True
            self._carry_out(self._pool.on_template_event(event, time.monotonic()))

    def _start_template(self) -> None:
        self._end_template()
        options, preload = self._options, self._config.preload_modules
        pairs = [socket.socketpair() for _ in (("--fd", "--warm-fd") if preload else ("--fd",))]
        theirs = [each.fileno() for _, each in pairs]
        command = python_command("wsgi_ts.batcher.template", "--fd", str(theirs[0]))
        for module in preload:
            command += ["--preload", module]
        if preload:
            command += ["--warm-fd", str(theirs[1])]
        command += ["--log-plan", str(self._files.log_plan), "--device", options.device]
        command += ["--metrics-mode", self._config.metrics_mode]
        if self._config.metrics_config is not None:
            command += ["--metrics-config", str(self._config.metrics_config)]
        if self._config.model_metrics_auto_detect:
            command.append("--metrics-auto-detect")
        # Where the supervisor reads this process's stderr, the template logs to the server's as well.
        stderr = logged_stderr()
        given = {STDERR_VARIABLE: str(stderr)} if stderr != sys.stderr.fileno() else {}
        self._template_process = subprocess.Popen(
            command,
            pass_fds=[*theirs, *map(int, given.values())],
            stdin=subprocess.DEVNULL,
            env=worker_environment(os.environ, self._config) | given,
        )
        for ours, passed in pairs:
            passed.close()
            channel = Channel(ours)
            self._templates.append(channel)
            self._selector.register(channel, selectors.EVENT_READ, partial(self._from_template, channel))

    def _end_template(self) -> None:
        """Ends the template (EOF makes it kill its workers) and reaps it."""
        for channel in self._templates:
            self._selector.unregister(channel)
            channel.close()
        self._templates.clear()
        process = self._template_process
        if process is not None:
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._template_process = None

    def _tell_templates(self, message: messages.ToTemplate, templates: Sequence[Channel]) -> None:
        for channel in templates:
            try:
                channel.send(TO_TEMPLATE.encode(message))
            except ChannelClosed:
                log.warning("The worker template has gone; its end is noticed in a moment.")

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case StartTemplate():
                    self._start_template()
                case StartWorker():
                    self._start_worker(action)
                case messages.KillWorker():
                    # Of a worker that is no fork of its own a template knows nothing.
                    self._tell_templates(action, self._templates)
                case messages.ReleaseWorker():
                    self._loop.command(action)
                case WorkerReady(worker_id, model_index, start_count):
                    mailbox = self._mailboxes[worker_id, start_count]
                    worker = Worker(worker_id, start_count, model_index, mailbox.capacity)
                    self._loop.command(loop.TakeWorker(worker, mailbox))
                case WorkerGone(worker_id, start_count, cause):
                    gone = self._mailboxes.pop((worker_id, start_count), None)
                    if gone is not None:
                        self._loop.command(loop.SettleWorker(gone, oom=cause == "oom"))
                case messages.WorkerReport() | messages.ModelUnloaded():
                    self._tell_supervisor(action)

    def _start_worker(self, action: StartWorker) -> None:
        options, spec = self._options, action.spec
        name = mailbox_name(options.prefix, options.index, action.worker_id, action.start_count)
        try:
            mailbox = BatcherMailbox(name, largest_batch(spec), spec.ranks)
        except OSError as error:  # /dev/shm is full, or this process has no descriptor left
            reason = str(error.strerror)
            actions = self._pool.worker_not_started(action.worker_id, action.start_count, reason, time.monotonic())
            self._carry_out(actions)
            return
        self._mailboxes[action.worker_id, action.start_count] = mailbox
        order = messages.SpawnWorker(
            worker_id=action.worker_id,
            start_count=action.start_count,
            spec=spec,
            gpu_id=action.gpu_id,
            devices=action.devices,
            prefix=options.prefix,
            batcher_index=options.index,
            threads=spec.threads_per_worker or self._threads_for_each(),
            traces=self._traces.to_dict(),
        )
        self._tell_templates(order, self._templates[-1:] if spec.needs_preloaded else self._templates[:1])

    def _threads_for_each(self) -> int:
        """CPU threads for a new worker: the cores shared out among the workers, 0 (no cap) where a GPU computes."""
        if self._options.device != "cpu":
            return 0
        budget: int = self._options.threads_budget
        return max(1, budget // max(1, sum(self._wanted.values())))
