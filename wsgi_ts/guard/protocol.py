"""What a supervisor says to its guard, and the names under which the guard keeps what outlives a supervisor.

Each is one packet: keep this descriptor under a name; close what has that name; this life serves; its start is
complete; it works, once a second where a watchdog listens; it ends, and the next life is to be this command with the
configuration that comes along; it was asked to stop, which the guard answers with the same word when it has done all
that was said before.

A guard outlives upgrades: what it says and hears here must mean the same to supervisors of later versions.
"""

from __future__ import annotations

import signal

KEEP, DROP, CAME_UP, STOPPING = b"keep ", b"drop ", b"came up", b"stopping"
STARTED, ALIVE, REPLACE = b"started", b"alive", b"replace "
PACKET_BYTES = 4096
#: The lock of the run directory; JSON with the tokens; JSON with the models.
LOCK, TOKENS, MODELS = "lock", "tokens", "models"
#: Signals that go on to the supervisor, which begins with them blocked, so that none comes before it can handle it.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
