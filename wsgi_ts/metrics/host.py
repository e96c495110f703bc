"""CPU, memory and disk of this machine, as TorchServe's system metrics count them."""

from __future__ import annotations

import psutil

_MEGABYTE = 1024 * 1024
_GIGABYTE = 1024 * 1024 * 1024


def cpu_utilization() -> float:
    """Percent of all cores in use since the last call, 0 at the first one."""
    return psutil.cpu_percent()


def memory_used() -> float:
    """Megabytes of memory in use."""
    return psutil.virtual_memory().used / _MEGABYTE


def memory_available() -> float:
    """Megabytes of memory that programs can still get."""
    return psutil.virtual_memory().available / _MEGABYTE


def memory_utilization() -> float:
    """Percent of the memory that is not available."""
    return psutil.virtual_memory().percent


def disk_used() -> float:
    """Gigabytes in use on the file system of `/`."""
    return psutil.disk_usage("/").used / _GIGABYTE


def disk_available() -> float:
    """Gigabytes that are free on the file system of `/`."""
    return psutil.disk_usage("/").free / _GIGABYTE


def disk_utilization() -> float:
    """Percent in use of the file system of `/`."""
    return psutil.disk_usage("/").percent


#: The metrics of the host by name.
MEASURES = {
    "CPUUtilization": cpu_utilization,
    "MemoryUsed": memory_used,
    "MemoryAvailable": memory_available,
    "MemoryUtilization": memory_utilization,
    "DiskUsage": disk_used,
    "DiskUtilization": disk_utilization,
    "DiskAvailable": disk_available,
}
