"""On which processors the data path is safe. Pure but for the question which one this is."""

from __future__ import annotations

import platform

#: What `uname -m` says of the processors whose memory order the data path relies on.
_SUPPORTED = ("x86_64", "AMD64")


def machine_problem(machine: str = "") -> str | None:
    """Why the server cannot run on a processor; None where it can.

    Processes hand slots over by plain stores: payload first, the state word last. On x86-64 other cores see the stores
    of one core in their order, and a load in the order of loads (Intel SDM, volume 3A, 8.2.2), so that who sees the
    state sees the payload. ARM and others promise neither, and Python has no fence to ask for it: there a request could
    be served with the bytes of the one before it.

    `machine` is as `uname -m` names it; empty: this one.
    """
    machine = machine or platform.machine()
    if machine in _SUPPORTED:
        return None
    return (
        f"this machine's processor ({machine}) is not supported: requests lie in memory that processes share without "
        "locks, which is safe on x86-64 (64-bit Intel and AMD) only; run the server there"
    )
