"""What can be asked of models: describe, list, readiness, and the tables of `wsgi-ts status`. Nothing changes.

Models are described with TorchServe's fields in its order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from wsgi_ts.gpu.devices import gpu_usage
from wsgi_ts.messages import WorkerReport, WorkerState
from wsgi_ts.models.model_yaml import ModelYaml
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion, WorkerRecord
from wsgi_ts.process import resident_bytes

_NO_YAML = ModelYaml()


class ModelQueries:
    """Answers questions about the models, as `ModelManager` does; `queued` tells how many requests of one wait."""

    def __init__(self, registry: Registry, queued: Callable[[ModelVersion], int]) -> None:
        self._registry = registry
        self._queued = queued

    def describe(self, *, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Describes one version, the default one, or with `all` every one."""
        with self._registry.changed:
            host = self._registry.function_host(model_name, None if version == "all" else version)
            if host is not None:
                models = [host]
            elif version == "all":
                versions = self._registry.versions_of(model_name)
                models = [versions[each] for each in in_hash_map_order(versions)]
            else:
                models = [self._registry.get(model_name, version)]
            # Taken here, described without the lock: asking for a GPU's load takes a while.
            found = [(model, list(model.workers.values())) for model in models]
        body = [describe_version(model, workers, self._queued(model)) for model, workers in found]
        if host is not None:
            body = [{**each, "modelName": model_name, "modelUrl": None, "batchSize": 1} for each in body]
        return {"status": 200, "body": body}

    def list_models(self, *, limit: int, next_page_token: int) -> dict[str, Any]:
        """Lists `limit` of the default versions by name, from number `next_page_token` on."""
        end = next_page_token + limit
        models = [model for model in self._registry.default_versions() if not model.spec.functions]
        body: dict[str, Any] = {}
        if end <= len(models):
            body["nextPageToken"] = str(end)
        page = models[next_page_token:end]
        body["models"] = [{"modelName": each.name, "modelUrl": each.directory.url} for each in page]
        return {"status": 200, "body": body}

    def kserve_ready(self, *, model_name: str) -> dict[str, Any]:
        """Whether a model has workers, as KServe asks it."""
        model = self._registry.function_host(model_name) or self._registry.get(model_name)
        return {"status": 200, "body": {"name": model_name, "ready": bool(model.workers)}}

    def status(self) -> dict[str, Any]:
        """The tables `models` and `workers` of `wsgi-ts status`."""
        with self._registry.changed:
            defaults = {(model.name, model.version) for model in self._registry.default_versions()}
            versions = self._registry.all_versions()
            models = [
                status_of_version(model, self._queued(model), is_default=(model.name, model.version) in defaults)
                for model in versions
            ]
            workers = [status_of_worker(model, each) for model in versions for each in model.workers.values()]
        return {"models": models, "workers": workers}


def describe_version(model: ModelVersion, workers: Iterable[WorkerRecord], queued: int) -> dict[str, Any]:
    """The description of one version, of whose requests `queued` wait."""
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
    # Without a time after which a sequence ends the other limits of sequences mean nothing.
    ends = yaml.sequence_max_idle_ms > 0
    description |= {
        "continuousBatching": yaml.continuous_batching,
        "useJobTicket": yaml.use_job_ticket,
        "useVenv": yaml.use_venv,
        "stateful": yaml.sequence_batching,
        "sequenceMaxIdleMSec": yaml.sequence_max_idle_ms,
        "sequenceTimeoutMSec": yaml.sequence_timeout_ms if ends else 0,
        "maxNumSequence": yaml.max_sequences if ends else 0,
        "maxSequenceJobQueueSize": yaml.max_sequence_queue if ends else 0,
        "loadedAtStartup": model.loaded_at_startup,
        "workers": [describe_worker(worker) for worker in workers],
        "jobQueueStatus": {"remainingCapacity": max(0, spec.job_queue_size - queued), "pendingRequests": queued},
    }
    return description


def describe_worker(worker: WorkerRecord) -> dict[str, Any]:
    """The description of one model worker; one that has died is told with its cause and its last lines of output."""
    report = _report_of(worker)
    description: dict[str, Any] = {
        "id": str(worker.worker_id),
        "startTime": _start_time(report.started_at_ms or worker.created_at_ms),
        "status": "READY" if worker.is_ready else "UNLOADING",
        "memoryUsage": resident_bytes(report.pid) if report.pid > 0 else 0,
        "pid": report.pid,
        "gpu": worker.gpu_id is not None,
        "gpuUsage": "N/A" if worker.gpu_id is None else gpu_usage(worker.gpu_id),
    }
    if worker.devices is not None:
        description["gpuIds"] = list(worker.devices)
    if report.progress and not worker.is_ready:
        description["progress"] = report.progress
    if report.exit_reason and not worker.is_ready:
        description |= {"lastExit": report.exit_reason, "lastLines": report.last_lines}
    return description


def status_of_version(model: ModelVersion, queued: int, *, is_default: bool) -> dict[str, Any]:
    """The row of a version in the table of `wsgi-ts status`."""
    return {
        "model": model.name,
        "version": model.version,
        "default": is_default,
        "workers": len(model.workers),
        "ready": sum(worker.is_ready for worker in model.workers.values()),
        "queued": queued,
    }


def status_of_worker(model: ModelVersion, worker: WorkerRecord) -> dict[str, Any]:
    """The row of a model worker in the table of `wsgi-ts status`."""
    report = _report_of(worker)
    return {
        "worker": worker.worker_id,
        "model": f"{model.name} {model.version}",
        "batcher": worker.batcher,
        "gpu": worker.gpu_id,
        "state": report.state,
        "pid": report.pid,
        "restarts": report.restarts,
        "last_end": report.exit_reason,
    }


def _report_of(worker: WorkerRecord) -> WorkerReport:
    """What is known of a worker; of one that its batcher has not spoken of yet, that it starts."""
    return worker.report or WorkerReport(worker.worker_id, 0, WorkerState.STARTING)


def _start_time(milliseconds: int) -> str:
    """Local time with a literal Z, as TorchServe writes it."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(seconds))}.{rest:03d}Z"


def in_hash_map_order(versions: Iterable[str]) -> list[str]:
    """Sorts versions as TorchServe lists them: by their places in the hash map of Java that it keeps them in.

    Clients see that order in the answer to `/models/{name}/all`, and some take the first entry. Versions with the same
    place keep the order they came in, as they do there until a twelfth version makes the map larger.
    """
    known = list(versions)
    places = 16
    while len(known) >= places * 3 // 4:
        places *= 2
    return sorted(known, key=lambda version: _java_hash(version) & (places - 1))


def _java_hash(text: str) -> int:
    """String.hashCode of Java, its upper half mixed into the lower one as Java's hash maps do."""
    units = text.encode("utf-16-le", "surrogatepass")
    code = 0
    for low, high in zip(units[::2], units[1::2], strict=True):
        code = (31 * code + (high << 8 | low)) & 0xFFFFFFFF
    return code ^ (code >> 16)
