"""nginx with the shipped deploy/nginx.conf: only places that belong to a machine are replaced."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from types import TracebackType

from support import debian
from support.authority import Authority
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess, free_ports

CONFIGURATION = REPOSITORY / "deploy" / "nginx.conf"


class Nginx:
    """A running nginx in front of a server; a context manager.

    Args:
        folder: for its files.
        server: the server behind it.
        authority: signs its certificate.
        changes: further replacements in the configuration.

    Attributes:
        port: where it speaks TLS.
        plain_port: where it speaks plain HTTP.
    """

    def __init__(
        self, folder: Path, server: ServerProcess, authority: Authority, changes: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.port, self.plain_port = free_ports(2)
        files = authority.pem("nginx")
        places = {
            "http {\n": f"http {{\n{self._own_places()}",
            "listen 443": f"listen 127.0.0.1:{self.port}",
            "    listen [::]:443 ssl http2;\n    ": "",
            "listen 80": f"listen 127.0.0.1:{self.plain_port}",
            "    listen [::]:80;\n    ": "",
            "/etc/ssl/certs/models.example.org.pem": files["certificate_file"],
            "/etc/ssl/private/models.example.org.key": files["private_key_file"],
            "127.0.0.1:8080": f"127.0.0.1:{server.ports['inference']}",
            "127.0.0.1:7070": f"127.0.0.1:{server.ports['grpc_inference']}",
            "worker_processes auto": "worker_processes 1",
        }
        text = CONFIGURATION.read_text()
        for old, new in {**places, **(changes or {})}.items():
            assert old in text, old
            text = text.replace(old, new)
        self.configuration = folder / "nginx.conf"
        self.configuration.write_text(text)

    def _own_places(self) -> str:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        lines = [f"{kind}_temp_path {self.folder}/{kind};" for kind in kinds]
        # What it passed on has an address there, what it answered itself has "-".
        lines += [
            "log_format passed '$upstream_addr $status $request';",
            f"access_log {self.folder}/access.log passed;",
        ]
        return "".join(f"    {line}\n" for line in lines)

    @property
    def command(self) -> list[str]:
        """Its command line, without what is to be done."""
        program = debian.program("nginx")
        assert program is not None
        directives = f"daemon off; pid {self.folder}/nginx.pid; error_log {self.folder}/error.log warn;"
        # Unless it may change its user, it has to stay who it is.
        directives += " user root;" if os.getuid() == 0 else ""
        return [program, "-p", os.fspath(self.folder), "-c", os.fspath(self.configuration), "-g", directives]

    def __enter__(self) -> Nginx:
        with (self.folder / "start.log").open("wb") as output:
            self._process = subprocess.Popen([*self.command], stderr=output)
        eventually(self._answers, within=10, what="start of nginx")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(60)

    def log(self, name: str) -> str:
        """The text of `access.log`, `error.log`, or `start.log`: what it said before that."""
        return (self.folder / name).read_text()

    def passed_on(self) -> int:
        """How many requests it has passed on to the server so far."""
        return sum(not line.startswith("- ") for line in self.log("access.log").splitlines())

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log("start.log")
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True
