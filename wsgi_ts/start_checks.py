"""What the supervisor checks before it starts anything, and the launcher's pid file, which it removes at its end."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.layout import SegmentLayout
from wsgi_ts.batcher.shared_memory import free_bytes
from wsgi_ts.config import Config

log = logging.getLogger(__name__)

_PID_FILE = ".model_server.pid"


class StartError(Exception):
    """The instance cannot start; the message says why and what to do, on one line."""


def check_shared_memory(config: Config, batchers: int) -> None:
    """Makes sure that what every web worker reserves fits.

    Raises:
        StartError: it does not; the message says what to do.
    """
    slots = 1 << (config.slots_per_worker - 1).bit_length()
    segment = SegmentLayout(slots, batchers, config.max_request_size, config.max_response_size)
    needed = layout.BOARD_BYTES + config.web_workers * segment.reserved_bytes
    available = free_bytes()
    if needed > available:
        raise StartError(
            f"/dev/shm is too small: need {needed} bytes, have {available} in /dev/shm: make it larger (docker: "
            f"--shm-size), or set web_workers (now {config.web_workers}) or slots_per_worker (now "
            f"{config.slots_per_worker}) lower"
        )


def remove_pid_file() -> None:
    """Removes the launcher's pid file if it names this process."""
    path = Path(tempfile.gettempdir()) / _PID_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            ours = file.read(64).strip() == str(os.getpid()).encode()
        if ours:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("pid file %s: %s", path, error)
