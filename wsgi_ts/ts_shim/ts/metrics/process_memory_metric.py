"""Memory of processes, for programs that collect system metrics."""

from __future__ import annotations

from typing import TextIO

from wsgi_ts.process import resident_bytes


def get_cpu_usage(pid: str) -> int:
    """Resident memory of a process in bytes, 0 where it does not run; the name is TorchServe's."""
    return resident_bytes(int(pid))


def check_process_mem_usage(stdin: TextIO) -> None:
    """Reads a line of process ids, separated by commas, and prints a line `pid:bytes` for each."""
    for pid in filter(str.isdigit, map(str.strip, stdin.readline().split(","))):
        print(f"{pid}:{get_cpu_usage(pid)}")
