"""What describe-model says of a version: TorchServe's fields in TorchServe's order."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from wsgi_ts.gpu.devices import gpu_usage
from wsgi_ts.models.model_yaml import ModelYaml
from wsgi_ts.models.registry import ModelVersion, WorkerRecord
from wsgi_ts.process import resident_bytes

_NO_YAML = ModelYaml()


def describe_version(model: ModelVersion, workers: Iterable[WorkerRecord], queued: int) -> dict[str, Any]:
    """The description of one version.

    Args:
        model: the version.
        workers: its workers.
        queued: how many of its requests wait.
    """
    spec, yaml = model.spec, model.yaml or _NO_YAML
    description: dict[str, Any] = {
        "modelName": model.name,
        "modelVersion": model.version,
        "modelUrl": model.directory.url,
        "runtime": spec.runtime,
        "minWorkers": model.min_workers,
        "maxWorkers": model.max_workers,
        "batchSize": spec.batch_size,
        "maxBatchDelay": spec.max_batch_delay_ms,
        "responseTimeout": int(spec.response_timeout_s),
        "startupTimeout": int(spec.startup_timeout_s),
        "maxRetryTimeoutInSec": int(spec.max_retry_timeout_s),
        "clientTimeoutInMills": spec.client_timeout_ms,
        "parallelType": yaml.parallel_type,
        "parallelLevel": yaml.parallel_level,
        "deviceType": model.placement.device_type,
    }
    if model.placement.device_ids is not None:
        description["deviceIds"] = list(model.placement.device_ids)
    description |= {
        "continuousBatching": yaml.continuous_batching,
        "useJobTicket": yaml.use_job_ticket,
        "useVenv": yaml.use_venv,
        "stateful": yaml.sequence_batching,
        **_sequence_settings(yaml),
        "loadedAtStartup": model.loaded_at_startup,
        "workers": [describe_worker(worker) for worker in workers],
        "jobQueueStatus": {
            "remainingCapacity": max(0, spec.job_queue_size - queued),
            "pendingRequests": queued,
        },
    }
    return description


def _sequence_settings(yaml: ModelYaml) -> dict[str, int]:
    """The limits of sequences; zeros where the model's file does not say after which time a sequence ends."""
    ends = yaml.sequence_max_idle > 0
    return {
        "sequenceMaxIdleMSec": yaml.sequence_max_idle,
        "sequenceTimeoutMSec": yaml.sequence_timeout if ends else 0,
        "maxNumSequence": yaml.sequence_limit if ends else 0,
        "maxSequenceJobQueueSize": yaml.max_sequence_job_queue_size if ends else 0,
    }


def describe_worker(worker: WorkerRecord) -> dict[str, Any]:
    """The description of one model worker; one that has died is told with its cause and its last lines of output."""
    report = worker.report
    pid = report.pid if report is not None else -1
    started_at_ms = (report.started_at_ms if report is not None else 0) or worker.created_at_ms
    description: dict[str, Any] = {
        "id": str(worker.worker_id),
        "startTime": _start_time(started_at_ms),
        "status": "READY" if worker.is_ready else "UNLOADING",
        "memoryUsage": resident_bytes(pid) if pid > 0 else 0,
        "pid": pid,
        "gpu": worker.gpu_id is not None,
        "gpuUsage": "N/A" if worker.gpu_id is None else gpu_usage(worker.gpu_id),
    }
    if worker.devices is not None:
        description["gpuIds"] = list(worker.devices)
    if report is not None and report.progress and not worker.is_ready:
        description["progress"] = report.progress
    if report is not None and report.exit_reason and not worker.is_ready:
        description |= {"lastExit": report.exit_reason, "lastLines": report.last_lines}
    return description


def _start_time(milliseconds: int) -> str:
    """Local time with a literal Z, as TorchServe writes it."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(seconds))}.{rest:03d}Z"
