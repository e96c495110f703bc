"""What an instance holds from its start to its end: run directory, sockets, certificates, board, registry, keys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from wsgi_ts import compiled_modules
from wsgi_ts.batcher.shm import layout
from wsgi_ts.checks.start import StartError, check_configuration
from wsgi_ts.gpu.devices import gpu_count
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.guard.protocol import LOCK
from wsgi_ts.instance.listeners import bind, grpc_sockets, rest_sockets
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.registry import Registry
from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.config_dump import configuration_lines
from wsgi_ts.supervisor.publisher import Publisher
from wsgi_ts.supervisor.start import make_board, make_keys, open_certificates, say_plugins, write_for_children

log = logging.getLogger(__name__)


class Resources:
    """Takes, in order, all that the instance needs before anything runs.

    Args:
        guard: has kept some of it since the supervisor before this one, and keeps it for the next.
        log_plan: what the children log, and where.
        stack: gives everything back, in reverse.
        ends_for_good: tells then whether no supervisor follows this one.

    Attributes:
        directory: the run directory.
        devices: one for each batcher: "cpu", "cuda:0", and so on.
        listeners, grpc_ports: the sockets that are listened on, and the ports that are held for gRPC.
        tls_fd: the memory with certificates; -1 where there are none.
        board, registry, publisher, keys, plugins: see their classes.

    Raises:
        StartError: something cannot be had (also RunDirectoryError, BindError).
    """

    def __init__(
        self,
        config: Config,
        guard: GuardLink,
        run_dir: Path,
        log_plan: LogPlan,
        stack: ExitStack,
        ends_for_good: Callable[[], bool],
    ) -> None:
        self.directory = RunDirectory.acquire(
            run_dir, lock_fd=guard.kept.get(LOCK), owner_pid=guard.pid, host_pid=config.embedded_in
        )
        guard.keep(LOCK, self.directory.lock_fd)
        stack.callback(lambda: self.directory.release(for_good=ends_for_good()))
        gpus = gpu_count(config.number_of_gpu)
        for line in configuration_lines(config, gpus):
            log.info("%s", line)
        say_plugins(config)
        log.info("Data path: %s", compiled_modules.describe())
        self.devices = ["cpu", *(f"cuda:{number}" for number in range(gpus))]
        if len(self.devices) > layout.MAX_BATCHERS:
            raise StartError(f"{gpus} GPUs are more than this server handles; set number_of_gpu")
        check_configuration(config, len(self.devices))
        self.listeners = bind(rest_sockets(config), guard.kept)
        stack.callback(self.close_listeners)
        self.grpc_ports = bind(grpc_sockets(config), guard.kept)
        for port in self.grpc_ports:
            stack.callback(port.close)
        for listener in (*self.listeners, *self.grpc_ports):
            guard.keep(listener.kept_as, listener.sock.fileno())
        self.tls_fd = open_certificates(config, stack)
        write_for_children(config, log_plan, self.directory)
        self.board = make_board(self.directory.prefix, len(self.devices), stack)
        numbers = Numbers(config.initial_worker_port, self.board.clear_model, config.initial_distribution_port)
        self.registry = Registry(numbers, self.board.clear_workflow)
        self.publisher = Publisher(self.registry, self.board, self.directory)
        self.publisher.routes()
        self.keys = make_keys(config, self.publisher.tokens, guard, stack)
        self.plugins = PluginReport(self.directory.path, "supervisor")
        for found in (Found(**row) for row in config.found_plugins):
            if found.target and (found.error or found.problem):
                self.plugins.note_earlier(found)
        stack.callback(self.plugins.close)

    @property
    def gpus(self) -> int:
        """How many GPUs there are."""
        return len(self.devices) - 1

    @property
    def addresses(self) -> dict[str, str]:
        """Where it listens, by the APIs that are served there."""
        return {
            **{"+".join(each.kinds): str(each.address) for each in self.listeners},
            **{f"gRPC {each.kinds[0]}": str(each.address) for each in self.grpc_ports},
        }

    def close_listeners(self) -> None:
        """Listens no more; may be called again."""
        for listener in self.listeners:
            listener.close()
