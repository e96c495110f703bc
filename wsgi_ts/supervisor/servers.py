"""The supervisor's gunicorns and its gRPC server: processes on ports that outlive them, started again when they die."""

from __future__ import annotations

import os
import signal
from abc import abstractmethod
from collections.abc import Sequence

from wsgi_ts.instance.listeners import BoundListener
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.process import python_command
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.child import ProcessGroup, SupervisedProcess

#: numpy's library for linear algebra, which none of them uses, starts a thread per core, each of which spins at first.
_NO_BLAS_THREADS = {"OPENBLAS_NUM_THREADS": "1"}


class Server(SupervisedProcess):
    """One gunicorn, or the gRPC server, through all its lives.

    Args:
        name: for people.
        tls_fd: a file with what TLS takes, -1 for none.
        workers: how many bytes in its inbox say that all of it has booted.

    Attributes:
        inbox: readable when the process has something to say of itself; -1 between two lives.
    """

    inbox: int = -1

    def __init__(self, name: str, directory: RunDirectory, tls_fd: int, workers: int) -> None:
        super().__init__(name, directory)
        self._tls_fd = tls_fd
        self._workers = workers
        self._booted = 0
        self._reopen_when_ready = False

    @abstractmethod
    def _command(self, common: list[str]) -> tuple[list[str], list[int]]:
        """Returns the command of the next life, with the arguments that all have, and the descriptors it inherits."""

    def _tls(self, *listeners: BoundListener) -> tuple[list[str], list[int]]:
        """Returns the arguments and the descriptors of a process that serves these, for TLS."""
        if self._tls_fd < 0 or not any(listener.address.is_tls for listener in listeners):
            return [], []
        return ["--tls-fd", str(self._tls_fd)], [self._tls_fd]

    def start(self) -> None:
        """Starts the next life.

        Raises:
            OSError, RuntimeError: no process or thread can be started; nothing has changed.
        """
        directory = self._directory
        common = ["--config-json", str(directory.config), "--run-dir", str(directory.path)]
        inbox, theirs = os.pipe()
        os.set_blocking(inbox, False)
        try:
            command, pass_fds = self._command([*common, "--prefix", directory.prefix, "--ready-fd", str(theirs)])
            self._run(command, [theirs, *pass_fds], _NO_BLAS_THREADS)
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

    def died(self, now: float) -> str:
        """Takes note of its death, at the monotonic time `now`; returns the reason."""
        os.close(self.inbox)
        self.inbox = -1
        return super().died(now)


class Gunicorn(Server):
    """One gunicorn: its arbiter, which has the web workers for children and looks after them.

    Args:
        kind: `inference` or `management`.
        workers: how many web workers it has.
    """

    def __init__(
        self, kind: str, listeners: Sequence[BoundListener], workers: int, directory: RunDirectory, tls_fd: int = -1
    ) -> None:
        super().__init__(f"gunicorn {kind}", directory, tls_fd, workers)
        self._kind = kind
        self._listeners = tuple(listeners)

    def _command(self, common: list[str]) -> tuple[list[str], list[int]]:
        tls, tls_fds = self._tls(*self._listeners)
        arguments = ["--kind", self._kind, *common, *tls]
        for listener in self._listeners:
            arguments += ["--listener", listener.argument]
        return python_command("wsgi_ts.web", *arguments), [*(each.sock.fileno() for each in self._listeners), *tls_fds]


class GrpcServer(Server):
    """The process of the gRPC APIs, which says once a second that it is well.

    Args:
        ports: those of the inference and of the management API.
    """

    hung_looks = 8

    def __init__(self, ports: Sequence[BoundListener], directory: RunDirectory, tls_fd: int = -1) -> None:
        super().__init__("gRPC server", directory, tls_fd, 1)
        self._ports = tuple(ports)

    def is_hung(self) -> bool:
        """Looks, once a second, whether it is up and was silent for too long."""
        return self.came_up and super().is_hung()

    def _command(self, common: list[str]) -> tuple[list[str], list[int]]:
        tls, tls_fds = self._tls(self._ports[0])
        fds = [port.sock.fileno() for port in self._ports]
        ports = [word for port, fd in zip(self._ports, fds, strict=True) for word in (f"--{port.kinds[0]}-fd", str(fd))]
        return python_command("wsgi_ts.rpc", *common, *ports, *tls), [*fds, *tls_fds]


class ExporterProcess(Server):
    """The process that sends spans to a collector, which says once a second that it is well."""

    hung_looks = 30

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__("span exporter", directory, -1, 1)

    def is_hung(self) -> bool:
        """Looks, once a second, whether it is up and was silent for too long."""
        return self.came_up and super().is_hung()

    def _command(self, common: list[str]) -> tuple[list[str], list[int]]:
        return python_command("wsgi_ts.supervisor.span_exporter", *common), []


def make_servers(
    config: Config,
    listeners: Sequence[BoundListener],
    grpc_ports: Sequence[BoundListener],
    directory: RunDirectory,
    tls_fd: int,
) -> list[Server]:
    """Makes the gunicorn that carries predictions, one for the rest if there is any, the gRPC server, the exporter.

    Args:
        config: the configuration.
        listeners: the sockets that are served; without any there are no servers.
        grpc_ports: the ports of the gRPC APIs, inference first.
        directory: the run directory.
        tls_fd: a file with what TLS takes, -1 for none.
    """
    if not listeners:  # an engine inside another process, which has a segment of its own
        return []
    inference = [listener for listener in listeners if "inference" in listener.kinds]
    others = [listener for listener in listeners if "inference" not in listener.kinds]
    management = [Gunicorn("management", others, 1, directory, tls_fd)] if others else []
    return [
        Gunicorn("inference", inference, config.web_workers, directory, tls_fd),
        *management,
        GrpcServer(grpc_ports, directory, tls_fd),
        *([ExporterProcess(directory)] if config.otlp_endpoint else []),
    ]


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
