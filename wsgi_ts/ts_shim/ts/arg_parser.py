"""The command lines of server and worker."""

import argparse

from wsgi_ts.cli.commands import torchserve_parser
from wsgi_ts.handlers.torchserve.socket_worker import worker_parser


class ArgParser:
    """The parsers by TorchServe's names."""

    ts_parser = staticmethod(torchserve_parser)
    model_service_worker_args = staticmethod(worker_parser)

    @staticmethod
    def extract_args(args: list[str] | None = None) -> argparse.Namespace:
        """The server's command line, by default that of this process, as an object."""
        return torchserve_parser().parse_args(args)
