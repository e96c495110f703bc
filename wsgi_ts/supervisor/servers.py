"""The supervisor's gunicorns and its gRPC server: processes on ports that outlive them, started again when they die."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from typing import Any

from wsgi_ts.instance.listeners import BoundListener
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.process import python_command
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.child import ProcessGroup, SupervisedProcess
from wsgi_ts.supervisor.resources import Resources

#: numpy's library for linear algebra, which none of them uses, starts a thread per core, each of which spins at first.
_NO_BLAS_THREADS = {"OPENBLAS_NUM_THREADS": "1"}
#: How long who says once a second that it is well may be silent, in seconds.
_GRPC_HUNG_S, _EXPORTER_HUNG_S = 8, 30


class Server(SupervisedProcess):
    """One gunicorn, the gRPC server or the exporter of spans, through all its lives.

    Args:
        name: for people.
        module: what is run.
        arguments: its own; those that all servers have are added.
        pass_fds: descriptors that it inherits.
        workers: how many bytes in its inbox say that all of it has booted.
        hung_looks: after how many seconds of silence it hangs, once it is up; infinity for one that says nothing.

    Attributes:
        inbox: readable when the process has something to say of itself; -1 between two lives.
    """

    inbox: int = -1

    def __init__(
        self,
        name: str,
        directory: RunDirectory,
        module: str,
        arguments: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        *,
        workers: int = 1,
        hung_looks: float = math.inf,
    ) -> None:
        super().__init__(name, directory)
        self.hung_looks = hung_looks
        self._module = module
        self._arguments = arguments
        self._pass_fds = pass_fds
        self._workers = workers
        self._booted = 0
        self._reopen_when_ready = False

    def start(self) -> None:
        """Starts the next life; raises OSError or RuntimeError, with nothing changed, where that is not possible."""
        directory = self._directory
        inbox, theirs = os.pipe()
        os.set_blocking(inbox, False)
        common = ["--config-json", str(directory.config), "--run-dir", str(directory.path)]
        common += ["--prefix", directory.prefix, "--ready-fd", str(theirs)]
        try:
            command = python_command(self._module, *common, *self._arguments)
            self._run(command, [theirs, *self._pass_fds], _NO_BLAS_THREADS)
        except BaseException:
            os.close(inbox)
            raise
        finally:
            os.close(theirs)
        self.inbox = inbox
        self._booted = 0

    def reopen_logs(self) -> None:
        """Has its processes open their log files again, or once it is up where it is just starting."""
        self._reopen_when_ready = not self._booted
        if self._booted and self.child is not None:
            self.child.send_signal(signal.SIGUSR1)

    def hear(self) -> bool:
        """Reads its inbox; False when that is at its end (no process writes to it any more)."""
        try:
            data = os.read(self.inbox, 4096)
        except BlockingIOError:
            return True
        self._booted += len(data)
        self._silent_looks = 0
        if self._booted and self._reopen_when_ready:
            self.reopen_logs()
        self.came_up = self._booted >= self._workers
        self.has_worked = self.has_worked or self.came_up
        return bool(data)

    def is_hung(self) -> bool:
        """Looks, once a second, whether it is up and was silent for too long."""
        return self.came_up and super().is_hung()

    def died(self, now: float) -> str:
        """Takes note of its death, at the monotonic time `now`; returns the reason."""
        os.close(self.inbox)
        self.inbox = -1
        return super().died(now)


def make_servers(config: Config, held: Resources) -> list[Server]:
    """Makes the gunicorn that carries predictions, one for the rest if there is any, the gRPC server, the exporter.

    There are none in an engine inside another process, which listens nowhere and has a segment of its own.
    """
    listeners, directory, tls_fd = held.listeners, held.directory, held.tls_fd
    if not listeners:
        return []

    def serving(
        name: str, module: str, served: Sequence[BoundListener], arguments: list[str], **options: Any
    ) -> Server:
        fds = [each.sock.fileno() for each in served]
        if tls_fd >= 0 and any(each.address.is_tls for each in served):
            fds, arguments = [*fds, tls_fd], [*arguments, "--tls-fd", str(tls_fd)]
        return Server(name, directory, module, arguments, fds, **options)

    def gunicorn(kind: str, served: Sequence[BoundListener], workers: int) -> Server:
        arguments = ["--kind", kind, *(word for each in served for word in ("--listener", each.argument))]
        return serving(f"gunicorn {kind}", "wsgi_ts.web", served, arguments, workers=workers)

    inference = [listener for listener in listeners if "inference" in listener.kinds]
    others = [listener for listener in listeners if "inference" not in listener.kinds]
    ports = [word for port in held.grpc_ports for word in (f"--{port.kinds[0]}-fd", str(port.sock.fileno()))]
    servers = [gunicorn("inference", inference, config.web_workers)]
    servers += [gunicorn("management", others, 1)] if others else []
    servers.append(serving("gRPC server", "wsgi_ts.rpc", held.grpc_ports, ports, hung_looks=_GRPC_HUNG_S))
    if config.otlp_endpoint:
        module = "wsgi_ts.supervisor.span_exporter"
        servers.append(Server("span exporter", directory, module, hung_looks=_EXPORTER_HUNG_S))
    return servers


class Servers(ProcessGroup[Server]):
    """All gunicorns of an instance, and its gRPC server."""

    @property
    def is_ready(self) -> bool:
        """Whether all web workers and the gRPC server have booted at least once."""
        return all(server.has_worked for server in self.processes)

    def reopen_logs(self) -> None:
        """Has all processes open their log files again."""
        for server in self.processes:
            server.reopen_logs()

    def stop(self) -> None:
        """Tells them to end what is under way and to go."""
        for server in self.processes:
            if server.child is not None:
                server.child.send_signal(signal.SIGTERM)

    def _start(self, process: Server) -> None:
        process.start()

    def _hear(self, process: Server) -> bool:
        goes_on = process.hear()
        self._owner.on_ready()
        return goes_on
