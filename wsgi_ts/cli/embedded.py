"""`python -m wsgi_ts.cli.embedded`: starts a server that is an engine of another process (`integrations.engine`).

Returns as soon as the server's guard runs. The guard is nobody's child then: what the other process does to its
children when it ends must not keep the guard from tidying up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from wsgi_ts.cli.start import start_embedded
from wsgi_ts.settings.config import ConfigError
from wsgi_ts.settings.sources import CommandLine


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.cli.embedded", description=__doc__)
    parser.add_argument("--owner", type=int, required=True, help="the process that it belongs to")
    parser.add_argument("--ts-config", required=True, help="configuration file")
    parser.add_argument("--run-dir", required=True)
    options = parser.parse_args(arguments)
    command_line = CommandLine(ts_config=options.ts_config, run_dir=options.run_dir, no_config_snapshots=True)
    try:
        return start_embedded(command_line, options.owner)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
