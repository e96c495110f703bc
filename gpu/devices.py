"""The accelerators of this machine, found without loading torch: NVIDIA's own tool and CUDA_VISIBLE_DEVICES.

Numbers are those that a process of this server sees: with CUDA_VISIBLE_DEVICES=2,3 the GPUs are 0 and 1.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

#: What restricts the GPUs that a process sees: NVIDIA's variable, and AMD's where they are in use.
VISIBILITY_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
#: The tool may hang with a broken driver; nobody waits longer than this, in seconds.
QUERY_TIMEOUT_S = 20.0
USAGE_FAILED = "failed to obtained gpu usage"
_USAGE_FIELDS = ("utilization.gpu", "utilization.memory", "memory.used")
_USAGE_NAMES = ("utilization.gpu [%]", "utilization.memory [%]", "memory.used [MiB]")
_LOAD_FIELDS = ("utilization.gpu", "memory.used", "memory.total")
#: What `gpu_details` asks, and its names for the numbers.
_DETAIL_FIELDS = {
    "utilization.gpu": "utilization",
    "memory.used": "memory_used_mib",
    "memory.total": "memory_total_mib",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
}


def gpu_count(limit: int | None, environ: Mapping[str, str] = os.environ) -> int:
    """How many GPUs models may use, at most `limit`, the key `number_of_gpu`; None for all."""
    if limit == 0:
        return 0
    found = len(visible_devices(environ))
    if limit is not None and limit > found:
        log.warning("number_of_gpu is %d, but there are %d GPUs: using those", limit, found)
    return found if limit is None else min(found, limit)


def visible_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs as the driver names them (number or UUID), in the order of the numbers that processes see."""
    installed = _query("index")
    restricted = environ.get("CUDA_VISIBLE_DEVICES")
    if restricted is None:
        return installed
    wanted: list[str] = []
    for part in filter(None, map(str.strip, restricted.split(","))):
        # CUDA itself stops at the first entry that it does not understand ("-1" is how people say none).
        if part not in installed and not part.startswith(("GPU-", "MIG-")):
            break
        wanted.append(part)
    return wanted if installed else []


def visibility(devices: Sequence[int], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that show a process these GPUs only.

    Args:
        devices: numbers as processes of this server see them.
        environ: the environment variables; where they restrict the GPUs already, an entry (a number, or the name of a
            GPU or MIG slice) is passed through.
    """
    shown = {}
    for name in VISIBILITY_VARIABLES:
        restricted = environ.get(name)
        if restricted is None and name != VISIBILITY_VARIABLES[0]:
            continue
        entries = [part.strip() for part in (restricted or "").split(",") if part.strip()]
        shown[name] = ",".join(entries[number] if number < len(entries) else str(number) for number in devices)
    return shown


def gpu_usage(gpu_id: int, environ: Mapping[str, str] = os.environ) -> str:
    """The text that describe-model shows for a worker's GPU, in TorchServe's form."""
    devices = visible_devices(environ)
    if gpu_id >= len(devices):
        return USAGE_FAILED
    lines = _query(",".join(_USAGE_FIELDS), "--id=" + devices[gpu_id])
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != len(_USAGE_NAMES):
        return USAGE_FAILED
    shown = [f"{name}::{value}" for name, value in zip(_USAGE_NAMES, values, strict=True)]
    return " ".join([f"gpuId::{gpu_id}", *shown])


def _query(fields: str, *options: str) -> list[str]:
    """The lines that nvidia-smi prints, none where there is no such tool or it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, f"--query-gpu={fields}", "--format=csv,noheader", *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi failed, going on without GPUs: %s", error)
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def gpu_loads(count: int) -> list[dict[str, float]]:
    """Use of the first `count` GPUs: for each GPUUtilization and GPUMemoryUtilization in percent, GPUMemoryUsed in MB.

    Empty where the driver does not tell.
    """
    loads = []
    for device in visible_devices()[:count] if count else []:
        lines = _query(",".join(_LOAD_FIELDS), "--id=" + device)
        try:
            utilization, used, total = (float(value.split()[0]) for value in lines[0].split(","))
        except (IndexError, ValueError):
            return []
        memory = {"GPUMemoryUtilization": 100 * used / total if total else 0.0, "GPUMemoryUsed": used}
        loads.append({**memory, "GPUUtilization": utilization})
    return loads


def gpu_details(count: int, environ: Mapping[str, str] = os.environ) -> list[dict[str, Any]]:
    """The first `count` GPUs by one call of the driver's tool: number, name, use, memory, temperature and power.

    A number that the driver does not tell is None; empty where it tells nothing.
    """
    devices = visible_devices(environ)[:count]
    if not devices:
        return []
    fields = ",".join(("name", *_DETAIL_FIELDS))
    found = []
    for number, line in enumerate(_query(fields, "--id=" + ",".join(devices))):
        # A name may hold a comma; no number does.
        name, *values = line.rsplit(",", len(_DETAIL_FIELDS))
        numbers = {key: _number(value) for key, value in zip(_DETAIL_FIELDS.values(), values, strict=False)}
        found.append({"gpu": number, "name": name.strip(), **numbers})
    return found


def _number(text: str) -> float | None:
    """The number that a value with its unit begins with."""
    try:
        return float(text.split(maxsplit=1)[0])
    except (IndexError, ValueError):
        return None
