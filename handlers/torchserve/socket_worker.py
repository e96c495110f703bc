"""A model worker on a socket that speaks TorchServe's frames: `python -m ts.model_service_worker`.

wsgi-ts starts none of these; they are for tools and tests that talk to TorchServe's workers. One worker accepts one
connection, loads one model when told so, and ends when the connection does.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import socket
import sys
from collections.abc import Sequence
from typing import Any

from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.log_records import configure_logging
from wsgi_ts.handlers.torchserve.metrics_cache import LoggedMetrics, LoggedMetricsCache
from wsgi_ts.handlers.torchserve.model_loader import ModelLoaderFactory
from wsgi_ts.handlers.torchserve.service import Service
from wsgi_ts.handlers.torchserve.wire import create_load_model_response, retrieve_msg

log = logging.getLogger(__name__)

#: How long a worker waits for its connection, in seconds.
SOCKET_ACCEPT_TIMEOUT = 30.0
#: Whether a worker waits for ever, as somebody who debugs it connects by hand.
DEBUG = False


class TorchModelServiceWorker:
    """A worker; `run_server` serves one connection.

    Args:
        s_type: "unix" or "tcp".
        s_name: path of the unix socket; a file that is there already is removed.
        host_addr: address to listen on for tcp, by default 127.0.0.1.
        metrics_config: path of the metrics configuration, None for none.

    Raises:
        ValueError: socket type, path or port is missing or wrong.
        RuntimeError: the path of the unix socket cannot be freed.
        NotImplementedError: `async_comm` is set.
    """

    def __init__(
        self,
        s_type: str | None = None,
        s_name: str | None = None,
        host_addr: str | None = None,
        port_num: int | str | None = None,
        metrics_config: str | None = None,
        async_comm: bool = False,
    ) -> None:
        if async_comm:
            raise NotImplementedError("this worker has no asynchronous communication")
        if s_type not in ("unix", "tcp"):
            raise ValueError("Incomplete data provided. Model worker expects socket type, unix or tcp")
        self.sock_type = s_type
        self.metrics_config = metrics_config
        self.service: Service | None = None
        self._address: Any = s_name
        if s_type == "tcp":
            if port_num is None:
                raise ValueError("Wrong data provided. Model worker expects port number")
            self._address = (host_addr or "127.0.0.1", int(port_num))
        elif s_name is None:
            raise ValueError("Incomplete data provided. Model worker expects socket name")
        else:
            try:
                self._free_address()
            except OSError as error:
                raise RuntimeError(f"socket already in use: {s_name}.") from error
        self.sock_name = self._address[0] if s_type == "tcp" else s_name
        self.sock = socket.socket(socket.AF_UNIX if s_type == "unix" else socket.AF_INET, socket.SOCK_STREAM)
        self.metrics_cache = LoggedMetricsCache(metrics_config) if metrics_config else LoggedMetrics()
        if metrics_config:
            self.metrics_cache.initialize_cache()

    def run_server(self) -> None:
        """Listens, says so on stdout, and serves the first connection until it ends.

        Raises:
            TimeoutError: nobody connected within `SOCKET_ACCEPT_TIMEOUT`.
            OSError: the address cannot be listened on.
        """
        try:
            self.sock.bind(self._address)
            self.sock.listen(1)
            if not DEBUG:
                self.sock.settimeout(SOCKET_ACCEPT_TIMEOUT)
            print(f"Listening on port: {self._address}", f"[PID]{os.getpid()}", sep="\n")
            print("Torch worker started.", f"Python runtime: {platform.python_version()}", sep="\n", flush=True)
            with self.sock.accept()[0] as connection:
                connection.setblocking(True)
                print(f"Connection accepted: {self._address}.", flush=True)
                self.handle_connection(connection)
        except TimeoutError:
            log.error("Backend worker did not receive connection in: %d", SOCKET_ACCEPT_TIMEOUT)
            raise
        finally:
            self.sock.close()
            if self.service is not None:
                self.service.close()
            self._free_address()

    def _free_address(self) -> None:
        if self.sock_type == "unix":
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._address)

    def handle_connection(self, cl_socket: socket.socket) -> None:
        """Carries out commands until a load fails with a status.

        Raises:
            SystemExit: 0, the connection has ended.
            RuntimeError: a batch before the model was loaded.
            ValueError: an unknown command, or JSON that is nested too deep.
            BaseException: what a handler's initialisation raised.
        """
        self.service = None
        while True:
            try:
                command, message = retrieve_msg(cl_socket)
            except ConnectionError:
                log.info("Frontend disconnected.")
                sys.exit(0)
            if command == b"L":
                service, text, code = self.load_model(message)
                cl_socket.sendall(create_load_model_response(code, text))
                if service is None:
                    return
                self.service = service
                service.set_cl_socket(cl_socket)
            elif command == b"I":
                if self.service is None:
                    raise RuntimeError(f"Received command: {command!r}, but service is not loaded")
                cl_socket.sendall(self.service.predict(message))
            else:
                raise ValueError(f"Received unknown command: {command!r}")

    def load_model(self, load_model_request: dict[str, Any]) -> tuple[Service | None, str, int]:
        """Loads the model that a load command names.

        Returns:
            The service or None, a text, and TorchServe's status: 200, 500 or 507.
        """
        name = load_model_request["modelName"].decode()
        batch_size = int(load_model_request.get("batchSize") or 1)
        gpu = load_model_request.get("gpu")
        envelope = load_model_request.get("envelope")
        print(f"model_name: {name}, batchSize: {batch_size}", flush=True)
        self.metrics_cache.model_name = name
        try:
            service = ModelLoaderFactory.get_model_loader().load(
                name,
                load_model_request["modelPath"].decode(),
                load_model_request["handler"].decode(),
                None if gpu is None else int(gpu),
                batch_size,
                envelope.decode() if envelope else None,
                load_model_request.get("limitMaxImagePixels", True),
                self.metrics_cache,
            )
        except LoadError as error:
            return None, error.message, error.status
        log.debug("Model %s loaded.", name)
        return service, f"loaded model {name}", 200


def worker_parser() -> argparse.ArgumentParser:
    """Returns the command line of a worker on a socket."""
    parser = argparse.ArgumentParser(prog="model-server-worker", description="A model worker on a socket")
    add = parser.add_argument
    add("--sock-type", required=True, choices=["unix", "tcp"], help="kind of socket to listen on")
    add("--sock-name", help="path of the unix socket")
    add("--host", help="address to listen on with tcp; default: 127.0.0.1")
    add("--port", help="port to listen on with tcp")
    add("--metrics-config", help="metrics configuration file")
    add("--async", dest="async_comm", action="store_true", help="asynchronous communication (not supported)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a worker; returns the exit status."""
    options = worker_parser().parse_args(arguments)
    configure_logging()
    try:
        worker = TorchModelServiceWorker(
            options.sock_type, options.sock_name, options.host, options.port, options.metrics_config, options.async_comm
        )
        worker.run_server()
    except Exception:
        log.exception("Backend worker process died.")
        return 1
    return 0 if worker.service is not None else 1


if __name__ == "__main__":
    sys.exit(main())
