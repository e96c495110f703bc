"""CPU, memory and disk of this machine, as TorchServe's system metrics count them."""

from __future__ import annotations

from collections.abc import Callable

import psutil

_MEGABYTE = 1024 * 1024
_GIGABYTE = 1024 * 1024 * 1024

#: The metrics of the host by name: utilization in percent (of the CPU since the last call; of the memory what is not
#: available), memory in megabytes, the file system of `/` in gigabytes.
MEASURES: dict[str, Callable[[], float]] = {
    "CPUUtilization": psutil.cpu_percent,
    "MemoryUsed": lambda: psutil.virtual_memory().used / _MEGABYTE,
    "MemoryAvailable": lambda: psutil.virtual_memory().available / _MEGABYTE,
    "MemoryUtilization": lambda: psutil.virtual_memory().percent,
    "DiskUsage": lambda: psutil.disk_usage("/").used / _GIGABYTE,
    "DiskUtilization": lambda: psutil.disk_usage("/").percent,
    "DiskAvailable": lambda: psutil.disk_usage("/").free / _GIGABYTE,
}
