"""Asks the supervisor of a running instance over its control socket; used by the command line."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from wsgi_ts.channel import Channel, ChannelClosed
from wsgi_ts.errors import ServerError


class NotRunning(Exception):
    """No instance answers in this run directory."""


def call_supervisor(run_dir: Path, request: dict[str, Any], timeout_s: float = 10.0) -> Any:
    """Sends one request and returns its result.

    Args:
        run_dir: the instance's run directory.
        request: the operation, `{"op": NAME, ...}`.
        timeout_s: seconds to wait for the connection, and for the answer.

    Raises:
        NotRunning: nobody listens, or the supervisor went away, or does not answer in time.
        ServerError: the supervisor refused the operation.
    """
    path = run_dir / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
            answer = Channel(sock).call(request)
        except TimeoutError:
            raise NotRunning(f"no answer on {path} within {timeout_s:g} s") from None
        except (OSError, ChannelClosed, json.JSONDecodeError) as error:
            raise NotRunning(f"nothing answers on {path} ({error})") from None
    if "error" in answer:
        raise ServerError.from_dict(answer["error"])
    return answer.get("ok")
