"""model-config.yaml: what one archive says of itself.

`ModelYaml` is the table of the file's keys. What the server does not know is for the handler. A wrong value stops
nothing, as in TorchServe: it is warned of, with file, line and key, and counts as not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any

from wsgi_ts.archive.manifest import YamlSettings
from wsgi_ts.errors import InvalidModel
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import BATCH_POLICIES
from wsgi_ts.settings.kinds import DEVICE_IDS, FLAG, SECTION, TEXT, choice, whole
from wsgi_ts.settings.table import ours, setting, settings_of

#: Parallel types whose ranks are started by torchrun; under `custom` one process has all the GPUs.
TORCHRUN_TYPES = ("pp", "tp", "pptp")


@dataclass(frozen=True, slots=True)
class TorchrunOptions:
    """The `torchrun` section: how a model that spans several processes is launched. Times in seconds."""

    nnodes: int = setting(whole(1), 1, "machines", key="nnodes")
    nproc_per_node: int = setting(whole(1), 1, "processes; takes the place of parallelLevel", key="nproc-per-node")
    rdzv_backend: str = setting(TEXT, "c10d", "how the processes find each other", key="rdzv-backend")
    rdzv_endpoint: str | None = setting(TEXT, None, "where they do", key="rdzv-endpoint")
    rdzv_conf: str | None = setting(TEXT, None, "further settings of that", key="rdzv-conf")
    monitor_interval: int = setting(whole(1, "s"), 5, "period of torchrun's watch", key="monitor-interval")
    node_rank: int = setting(whole(0), 0, "number of this machine", key="node-rank")
    master_addr: str | None = setting(TEXT, None, "address of the first process", key="master-addr")
    master_port: int | None = setting(whole(0), None, "port of the first process", key="master-port")
    omp_number_threads: int = setting(whole(1), 1, "OMP_NUM_THREADS of each", key="OMP_NUMBER_THREADS")


@dataclass(frozen=True, slots=True)
class ModelYaml:
    """A checked model-config.yaml; 0 is "not given" for workers, batch size and delay, as in TorchServe.

    What ModelSpec has too is called as there. `raw` is the whole file, with its lines.
    """

    min_workers: int = setting(
        whole(1, lift=True), 0, "workers to start; counts only with a maxWorkers not below it", key="minWorkers"
    )
    max_workers: int = setting(
        whole(0, lift=True), 0, "upper limit that describe shows; see minWorkers", key="maxWorkers"
    )
    batch_size: int = setting(whole(1, lift=True), 0, "most requests in one call of the handler", key="batchSize")
    max_batch_delay_ms: int = setting(whole(0, "ms"), 0, "longest wait for a batch to fill", key="maxBatchDelay")
    batch_policy: str | None = ours(
        choice(*BATCH_POLICIES), None, "when a batch that is not full goes; unset: batch_policy", key="batchPolicy"
    )
    batching: str | None = ours(
        TEXT, None, "plugin that says which requests go together: its name, or `module:attribute`", key="batching"
    )
    threads_per_worker: int = ours(
        whole(0),
        0,
        "CPU threads that the libraries of each worker use; 0: the cores shared out among the workers",
        key="threadsPerWorker",
    )
    max_executions: int = ours(
        whole(1),
        1,
        "how often a request may be given to the handler: above 1, a batch that fails runs again in halves, until the "
        "request to blame is alone",
        key="maxExecutions",
    )
    response_timeout_s: int = setting(
        whole(1, "s"), 120, "longest run of the handler for one batch; then its worker is killed", key="responseTimeout"
    )
    startup_timeout_s: int = setting(whole(1, "s"), 120, "longest loading of the model", key="startupTimeout")
    max_retry_timeout_s: int = setting(
        whole(0, "s"), 300, "how long a worker that keeps failing is started again", key="maxRetryTimeoutInSec"
    )
    client_timeout_ms: int = setting(
        whole(0, "ms"),
        0,
        "longest time from the request's arrival to its answer, else 408, and never run if not begun; 0: no end",
        key="clientTimeoutInMills",
    )
    job_queue_size: int | None = setting(
        whole(1), None, "requests waiting for the model; above: 503; unset: job_queue_size", key="jobQueueSize"
    )
    use_job_ticket: bool = setting(
        FLAG, False, "a request is taken by a free worker at once, or refused with 503", key="useJobTicket"
    )
    device_type: str | None = setting(
        choice("cpu", "gpu"), None, "where the workers run; unset: on GPUs if there are any", key="deviceType"
    )
    device_ids: tuple[int, ...] | None = setting(DEVICE_IDS, None, "GPUs to use; unset: all, in turn", key="deviceIds")
    parallel_type: str = setting(
        choice("", "pp", "tp", "pptp", "custom"),
        "",
        "pp, tp, pptp: a worker is several processes, started by torchrun; custom: it has several GPUs",
        key="parallelType",
    )
    parallel_level: int = setting(whole(0), 0, "GPUs of one worker; counts only with parallelType", key="parallelLevel")
    torchrun: TorchrunOptions | None = setting(
        SECTION, None, "how the processes of such a worker are started; its keys are below", key="torchrun"
    )
    sequence_batching: bool = setting(
        FLAG, False, "the requests of a sequence go to one worker", key="sequenceBatching"
    )
    continuous_batching: bool = setting(
        FLAG, False, "requests join a batch that is under way", key="continuousBatching"
    )
    async_communication: bool = setting(
        FLAG, False, "requests go to an async handler as they come, each by itself", key="asyncCommunication"
    )
    use_venv: bool = setting(FLAG, False, "the workers have a Python environment of their own", key="useVenv")
    sequence_max_idle_ms: int = setting(
        whole(0, "ms"), 0, "a sequence without requests ends after this", key="sequenceMaxIdleMSec"
    )
    sequence_timeout_ms: int = setting(
        whole(0, "ms"), 0, "longest life of a sequence; 0: no end", key="sequenceTimeoutMSec"
    )
    max_sequence_queue: int = setting(
        whole(1, lift=True), 1, "requests waiting in one sequence", key="maxSequenceJobQueueSize"
    )
    max_sequences: int = setting(
        whole(1, lift=True), 1, "sequences at a time; at least `batchSize` times `maxWorkers`", key="maxNumSequence"
    )
    weights_only: bool | None = ours(
        FLAG,
        None,
        "the built-in handlers load weights, never pickled code; unset: torch_load_weights_only",
        key="weightsOnly",
    )
    raw: YamlSettings = field(default_factory=YamlSettings)
    warnings: tuple[str, ...] = ()


def parse_model_yaml(fields: Mapping[str, Any]) -> ModelYaml:
    """Checks a model-config.yaml as the YAML reader returned it; keys that the server does not know are the handler's.

    The result's `warnings` have one line for each key that was wrong and counts as not given.
    """
    file = fields if isinstance(fields, YamlSettings) else YamlSettings(fields)
    warnings: list[str] = []
    values = _read(ModelYaml, file, file, "", warnings)
    section = values.get("torchrun")
    if section is not None:
        torchrun = TorchrunOptions(**_read(TorchrunOptions, section, file, "torchrun.", warnings))
        level = values.get("parallel_level")
        if "nproc-per-node" not in section:
            torchrun = replace(torchrun, nproc_per_node=max(1, level or 1))
        elif level is not None and level != torchrun.nproc_per_node:
            counts = f"torchrun.nproc-per-node, {torchrun.nproc_per_node}, counts instead"
            warnings.append(f"{file.where('parallelLevel')}: {counts}")
        if "nproc-per-node" in section and not values.get("parallel_type"):
            without = "has no effect without parallelType (pp, tp or pptp)"
            warnings.append(f"{file.where('torchrun.nproc-per-node')}: {without}")
        values |= {"torchrun": torchrun, "parallel_level": torchrun.nproc_per_node}
    if values.get("sequence_batching") and not values.get("sequence_max_idle_ms"):
        warnings.append(f"{file.where('sequenceBatching')}: needs a sequenceMaxIdleMSec above 0; it is off")
        del values["sequence_batching"]
    if values.get("async_communication"):
        for name, key in (("continuous_batching", "continuousBatching"), ("sequence_batching", "sequenceBatching")):
            if values.pop(name, False):
                warnings.append(f"{file.where(key)}: does not go with asyncCommunication; it is off")
    if values.get("max_executions", 1) > 1:
        keys = {"continuous_batching": "continuousBatching", "sequence_batching": "sequenceBatching"}
        keys |= {"async_communication": "asyncCommunication"}
        other = next((key for name, key in keys.items() if values.get(name)), "")
        if values.get("parallel_type") in TORCHRUN_TYPES:
            other = "parallelType"
        if other:
            warnings.append(f"{file.where('maxExecutions')}: does not go with {other}; it is 1")
            del values["max_executions"]
    # Never fewer sequences than what all workers can have in a batch.
    in_batches = values.get("batch_size", 0) * values.get("max_workers", 0)
    values["max_sequences"] = max(values.get("max_sequences", 1), in_batches)
    if not values.get("parallel_type"):
        values["parallel_level"] = 0
    return ModelYaml(**values, raw=file, warnings=tuple(warnings))


def _read(
    table: type, fields: Mapping[str, Any], file: YamlSettings, prefix: str, warnings: list[str]
) -> dict[str, Any]:
    """The checked values of the keys that are there, by field; those that are wrong are left out, with a warning."""
    values = {}
    for name, row in settings_of(table).items():
        value = fields.get(row.key)
        if value is None:
            continue
        try:
            values[name] = row.kind.parse(value)
        except ValueError as error:
            warnings.append(f"{file.where(prefix + row.key)}: {error}; taken as not given")
    return values


def check_parallel(yaml: ModelYaml) -> None:
    """Raises InvalidModel where `parallelType` goes with nothing else: workers would hang."""
    has_ranks = yaml.parallel_type in TORCHRUN_TYPES
    if has_ranks and yaml.parallel_level < 1:
        fault = f"{yaml.parallel_type} needs the number of processes of a worker: add torchrun.nproc-per-node"
        raise _contradiction(yaml, "parallelType", fault)
    if has_ranks and yaml.async_communication:
        fault = (
            f"does not go with parallelType {yaml.parallel_type}: set parallelType to custom, and the handler's one "
        )
        raise _contradiction(yaml, "asyncCommunication", f"{fault}process gets all the GPUs")


def _contradiction(yaml: ModelYaml, key: str, fault: str) -> InvalidModel:
    return InvalidModel(f"{yaml.raw.place(key)}: {key} {fault}")


def launch_options(yaml: ModelYaml) -> TorchrunOptions | None:
    """How torchrun starts a worker of this model; None where it does not."""
    if yaml.parallel_type not in TORCHRUN_TYPES:
        return None
    return yaml.torchrun or TorchrunOptions(nproc_per_node=yaml.parallel_level)
