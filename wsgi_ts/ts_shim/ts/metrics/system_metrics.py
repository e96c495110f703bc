"""What the system metrics are, for programs that collect them (`system_metrics_cmd`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wsgi_ts.gpu.devices import gpu_loads
from wsgi_ts.handlers.metrics.metric import Dimension
from wsgi_ts.handlers.metrics.store import Metric
from wsgi_ts.metrics.host import MEASURES

_UNITS = {"MemoryUsed": "MB", "MemoryAvailable": "MB", "DiskUsage": "GB", "DiskAvailable": "GB", "GPUMemoryUsed": "MB"}
#: The metrics collected last.
system_metrics: list[Metric] = []


def _recorder(function: str, name: str) -> Callable[[], None]:
    measure = MEASURES[name]

    def record() -> None:
        system_metrics.append(Metric(name, measure(), _UNITS.get(name, "percent"), [Dimension("Level", "Host")]))

    record.__name__ = function
    record.__doc__ = f"Adds {name} to `system_metrics`."
    return record


cpu_utilization = _recorder("cpu_utilization", "CPUUtilization")
memory_used = _recorder("memory_used", "MemoryUsed")
memory_available = _recorder("memory_available", "MemoryAvailable")
memory_utilization = _recorder("memory_utilization", "MemoryUtilization")
disk_used = _recorder("disk_used", "DiskUsage")
disk_utilization = _recorder("disk_utilization", "DiskUtilization")
disk_available = _recorder("disk_available", "DiskAvailable")
_recorders = (
    *(cpu_utilization, memory_used, memory_available, memory_utilization),
    *(disk_used, disk_utilization, disk_available),
)


def gpu_utilization(num_of_gpu: int) -> None:
    """Adds the use of the first GPUs to `system_metrics`."""
    for number, load in enumerate(gpu_loads(num_of_gpu)):
        dimensions = [Dimension("Level", "Host"), Dimension("device_id", str(number))]
        system_metrics.extend(
            Metric(name, value, _UNITS.get(name, "percent"), dimensions) for name, value in load.items()
        )


def collect_all(mod: Any = None, num_of_gpu: int = 0) -> None:
    """Measures everything once and prints it, one metric a line.

    Args:
        mod: not used; TorchServe's collector passes this module.
        num_of_gpu: how many GPUs to measure.
    """
    system_metrics.clear()
    for record in _recorders:
        record()
    gpu_utilization(num_of_gpu)
    for metric in system_metrics:
        print(metric)
