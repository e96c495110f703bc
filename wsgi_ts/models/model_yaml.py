"""model-config.yaml: what one archive says of itself, and which word counts where several speak.

`ModelYaml` is the table of the file's keys: one field is one key. `parse_model_yaml` checks the mapping that the
YAML reader returned; a value of another type is converted where that loses nothing ("3", 3.0), else the key is warned
of and keeps its default. `effective_settings` joins the
register call, the archive's YAML, the `models` key and the server's defaults, in TorchServe's order of precedence
(which is not the same for all settings).
"""

# ruff: noqa: RUF009 (_key() is dataclasses.field() with a row of the table)

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wsgi_ts.settings.config import Config, ModelDefaults
from wsgi_ts.settings.conversion import to_boolean, to_whole_number
from wsgi_ts.settings.kinds import Effect

DEFAULT_BATCH_SIZE = 1
DEFAULT_MAX_BATCH_DELAY_MS = 100
#: With `debug` workers have this long for everything, so that they can be stopped in a debugger: a week.
DEBUG_TIMEOUT_S = 7 * 86400
BATCH_POLICIES = ("adaptive", "fixed", "none")


@dataclass(frozen=True, slots=True)
class YamlKind:
    """One kind of value in the file.

    Attributes:
        name: for people ("whole number, s").
        check: from what the YAML reader returned to the value; raises ValueError("should be …").
    """

    name: str
    check: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class YamlKey:
    """One row of the table of the file's keys; its default is that of the dataclass field.

    Attributes:
        key: as it is spelt in the file.
        kind: the kind of value.
        help: one line for the reference page.
        ours: a key that TorchServe does not know.
        effect: whether the server obeys it.
    """

    key: str
    kind: YamlKind
    help: str
    ours: bool = False
    effect: Effect = "yes"


def _key(key: str, kind: YamlKind, default: Any, help: str, *, ours: bool = False, effect: Effect = "yes") -> Any:
    return field(default=default, metadata={"yaml": YamlKey(key, kind, help, ours, effect)})


def _whole(minimum: int, unit: str = "", *, lift: bool = False) -> YamlKind:
    """A whole number from `minimum` on; a smaller one is lifted to it, or refused."""

    def check(value: Any) -> int:
        try:
            number = to_whole_number(value)
        except ValueError:
            raise ValueError("should be integer") from None
        if number < minimum and not lift:
            raise ValueError(f"should be an integer of at least {minimum}")
        return max(minimum, number)

    return YamlKind(f"whole number{', ' + unit if unit else ''}", check)


def _word(*words: str) -> YamlKind:
    """One of some words, in any case."""

    def check(value: Any) -> str:
        word = value.strip().lower() if isinstance(value, str) else None
        if word not in words:
            raise ValueError(f"should be {', '.join(filter(None, words[:-1]))} or {words[-1]}")
        return word

    return YamlKind(" | ".join(filter(None, words)), check)


def _boolean(value: Any) -> bool:
    try:
        return to_boolean(value)
    except ValueError:
        raise ValueError("should be true or false") from None


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("should be string")
    return str(value)


def _device_ids(value: Any) -> tuple[int, ...]:
    try:
        numbers = tuple(map(to_whole_number, value if isinstance(value, list) else [value]))
    except ValueError:
        raise ValueError("should be list of integers") from None
    if any(number < 0 for number in numbers):
        raise ValueError("should be list of GPU numbers from 0")
    return numbers


def _section(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("should be a section of settings")
    return value


BOOLEAN = YamlKind("true | false", _boolean)
TEXT = YamlKind("text", _text)
DEVICE_IDS = YamlKind("list of GPU numbers", _device_ids)
SECTION = YamlKind("section", _section)


@dataclass(frozen=True, slots=True)
class TorchrunOptions:
    """The `torchrun` section: how a model that spans several processes is launched. Times in seconds."""

    nnodes: int = _key("nnodes", _whole(1), 1, "machines")
    nproc_per_node: int = _key("nproc-per-node", _whole(1), 1, "processes; takes the place of parallelLevel")
    rdzv_backend: str = _key("rdzv-backend", TEXT, "c10d", "how the processes find each other")
    rdzv_endpoint: str | None = _key("rdzv-endpoint", TEXT, None, "where they do")
    rdzv_conf: str | None = _key("rdzv-conf", TEXT, None, "further settings of that")
    monitor_interval: int = _key("monitor-interval", _whole(1, "s"), 5, "period of torchrun's watch")
    node_rank: int = _key("node-rank", _whole(0), 0, "number of this machine")
    master_addr: str | None = _key("master-addr", TEXT, None, "address of the first process")
    master_port: int | None = _key("master-port", _whole(0), None, "port of the first process")
    omp_number_threads: int = _key("OMP_NUMBER_THREADS", _whole(1), 1, "OMP_NUM_THREADS of each")


@dataclass(frozen=True, slots=True)
class ModelYaml:
    """A checked model-config.yaml; 0 is "not given" for workers, batch size and delay, as in TorchServe.

    Times are in the unit of their YAML key: `response_timeout`, `startup_timeout` and `max_retry_timeout` in
    seconds, `max_batch_delay`, `client_timeout` and the sequence times in milliseconds. `raw` is the whole
    file, for the handler.
    """

    min_workers: int = _key(
        "minWorkers", _whole(1, lift=True), 0, "workers to start; counts only with a maxWorkers not below it"
    )
    max_workers: int = _key("maxWorkers", _whole(0, lift=True), 0, "upper limit that describe shows; see minWorkers")
    batch_size: int = _key("batchSize", _whole(1, lift=True), 0, "most requests in one call of the handler")
    max_batch_delay: int = _key("maxBatchDelay", _whole(0, "ms"), 0, "longest wait for a batch to fill")
    batch_policy: str | None = _key(
        "batchPolicy",
        _word(*BATCH_POLICIES),
        None,
        "when a batch that is not full goes; unset: batch_policy",
        ours=True,
    )
    response_timeout: int = _key(
        "responseTimeout", _whole(1, "s"), 120, "longest run of the handler for one batch; then its worker is killed"
    )
    startup_timeout: int = _key("startupTimeout", _whole(1, "s"), 120, "longest loading of the model")
    max_retry_timeout: int = _key(
        "maxRetryTimeoutInSec", _whole(0, "s"), 300, "how long a worker that keeps failing is started again"
    )
    client_timeout: int = _key(
        "clientTimeoutInMills",
        _whole(0, "ms"),
        0,
        "longest time from the request's arrival to its answer, else 408, and never run if not begun; 0: no end",
    )
    job_queue_size: int | None = _key(
        "jobQueueSize", _whole(1), None, "requests waiting for the model; above: 503; unset: job_queue_size"
    )
    use_job_ticket: bool = _key(
        "useJobTicket", BOOLEAN, False, "a request is taken by a free worker at once, or refused with 503"
    )
    device_type: str | None = _key(
        "deviceType", _word("cpu", "gpu"), None, "where the workers run; unset: on GPUs if there are any"
    )
    device_ids: tuple[int, ...] | None = _key("deviceIds", DEVICE_IDS, None, "GPUs to use; unset: all, in turn")
    parallel_type: str = _key(
        "parallelType",
        _word("", "pp", "tp", "pptp", "custom"),
        "",
        "pp, tp, pptp: a worker is several processes, started by torchrun; custom: it has several GPUs",
    )
    parallel_level: int = _key("parallelLevel", _whole(0), 0, "GPUs of one worker; counts only with parallelType")
    torchrun: TorchrunOptions | None = _key(
        "torchrun", SECTION, None, "how the processes of such a worker are started; its keys are below"
    )
    sequence_batching: bool = _key("sequenceBatching", BOOLEAN, False, "the requests of a sequence go to one worker")
    continuous_batching: bool = _key("continuousBatching", BOOLEAN, False, "requests join a batch that is under way")
    async_communication: bool = _key(
        "asyncCommunication", BOOLEAN, False, "requests go to an async handler as they come, each by itself"
    )
    use_venv: bool = _key("useVenv", BOOLEAN, False, "the workers have a Python environment of their own")
    sequence_max_idle: int = _key(
        "sequenceMaxIdleMSec", _whole(0, "ms"), 0, "a sequence without requests ends after this"
    )
    sequence_timeout: int = _key("sequenceTimeoutMSec", _whole(0, "ms"), 0, "longest life of a sequence; 0: no end")
    max_sequence_job_queue_size: int = _key(
        "maxSequenceJobQueueSize", _whole(1, lift=True), 1, "requests waiting in one sequence"
    )
    max_num_sequence: int = _key(
        "maxNumSequence", _whole(1, lift=True), 1, "sequences at a time; at least `batchSize` times `maxWorkers`"
    )
    weights_only: bool | None = _key(
        "weightsOnly",
        BOOLEAN,
        None,
        "the built-in handlers load weights, never pickled code; unset: torch_load_weights_only",
        ours=True,
    )
    raw: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def has_worker_limits(self) -> bool:
        """Whether minWorkers and maxWorkers are a pair that counts."""
        return 0 < self.min_workers <= self.max_workers

    @property
    def sequence_limit(self) -> int:
        """How many sequences there may be at a time: never fewer than what all workers can have in a batch."""
        return max(self.max_num_sequence, self.batch_size * self.max_workers)


def yaml_keys(table: type[ModelYaml] | type[TorchrunOptions] = ModelYaml) -> Iterator[tuple[str, Any, YamlKey]]:
    """The rows of a table of keys, in order: name of the field, default, row."""
    for each in dataclasses.fields(table):
        if "yaml" in each.metadata:
            yield each.name, each.default, each.metadata["yaml"]


@dataclass(frozen=True, slots=True)
class RegisterArguments:
    """What a register call gave; None where it gave nothing (negative sizes and times count as nothing)."""

    batch_size: int | None = None
    max_batch_delay: int | None = None
    initial_workers: int | None = None
    response_timeout: int | None = None
    startup_timeout: int | None = None


@dataclass(frozen=True, slots=True)
class EffectiveSettings:
    """What holds for one model version: delays in milliseconds, time-outs in seconds.

    `min_workers` is the number of workers to start; `max_workers` the limit that describe-model shows.
    """

    batch_size: int
    max_batch_delay_ms: int
    response_timeout_s: int
    startup_timeout_s: int
    max_retry_timeout_s: int
    client_timeout_ms: int
    job_queue_size: int
    min_workers: int
    max_workers: int
    batch_policy: str
    weights_only: bool
    use_job_ticket: bool
    warnings: tuple[str, ...] = ()


def parse_model_yaml(fields: Mapping[str, Any]) -> ModelYaml:
    """Checks a model-config.yaml.

    Args:
        fields: the file as the YAML reader returned it; keys that the server does not know are the handler's.

    Returns:
        The settings; `warnings` holds one line for each key that was wrong and is at its default, and one for those
        that this version does not obey.
    """
    warnings: list[str] = []
    values = _read(ModelYaml, fields, "", warnings)
    section = values.get("torchrun")
    if section is not None:
        torchrun = TorchrunOptions(**_read(TorchrunOptions, section, "torchrun.", warnings))
        if "nproc-per-node" not in section:
            torchrun = replace(torchrun, nproc_per_node=max(1, values.get("parallel_level", 1)))
        values |= {"torchrun": torchrun, "parallel_level": torchrun.nproc_per_node}
    if values.get("sequence_batching") and not values.get("sequence_max_idle"):
        warnings.append("Invalid sequenceBatching: it needs a sequenceMaxIdleMSec above 0; it is off")
        del values["sequence_batching"]
    if values.get("async_communication"):
        for name, key in (("continuous_batching", "continuousBatching"), ("sequence_batching", "sequenceBatching")):
            if values.pop(name, False):
                warnings.append(f"Invalid {key}: it does not go with asyncCommunication; it is off")
    if not values.get("parallel_type"):
        values["parallel_level"] = 0
    return ModelYaml(**values, raw=dict(fields), warnings=tuple(warnings))


def _read(
    table: type[ModelYaml] | type[TorchrunOptions], fields: Mapping[str, Any], prefix: str, warnings: list[str]
) -> dict[str, Any]:
    """The checked values of the keys that are there, by field; those that are wrong are left out, with a warning."""
    values = {}
    for name, _, row in yaml_keys(table):
        value = fields.get(row.key)
        if value is None:
            continue
        try:
            values[name] = row.kind.check(value)
        except ValueError as error:
            warnings.append(f"Invalid {prefix}{row.key}: {_shown(value)}, {error}")
    return values


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def effective_settings(
    config: Config,
    yaml: ModelYaml | None,
    arguments: RegisterArguments | None,
    name: str,
    version: str,
    *,
    cores: int,
    gpus: int = 0,
) -> EffectiveSettings:
    """Decides every setting of a model version that more than one place can give.

    Args:
        config: the server's settings.
        yaml: the archive's model-config.yaml, None where it has none.
        arguments: what the register call gave; None for a model loaded at startup.
        name: the model's name.
        version: its version.
        cores: CPU cores; as many workers has a startup model of which nobody says anything, without GPUs.
        gpus: usable GPUs; as many workers has such a model where there are any.
    """
    given = arguments or RegisterArguments()
    defaults = config.model_defaults(name, version)
    minimum, maximum, warnings = _worker_limits(config, yaml, arguments, defaults, gpus or cores)
    if version not in config.models.get(name, {version: {}}):
        spoken_of = ", ".join(config.models[name]) or "none"
        warnings += (f"The key models says nothing of version {version}; its versions of this model: {spoken_of}",)
    said = yaml or ModelYaml()
    return EffectiveSettings(
        batch_size=_first(
            _positive(given.batch_size), said.batch_size or None, defaults.batch_size, DEFAULT_BATCH_SIZE
        ),
        max_batch_delay_ms=_first(
            _not_negative(given.max_batch_delay),
            said.max_batch_delay or None,
            defaults.max_batch_delay,
            DEFAULT_MAX_BATCH_DELAY_MS,
        ),
        response_timeout_s=_first(
            DEBUG_TIMEOUT_S if config.debug else None,
            None if yaml is None else yaml.response_timeout,
            defaults.response_timeout,
            _not_negative(given.response_timeout),
            config.default_response_timeout,
        ),
        startup_timeout_s=_first(
            DEBUG_TIMEOUT_S if config.debug else None,
            None if yaml is None else yaml.startup_timeout,
            defaults.startup_timeout,
            _not_negative(given.startup_timeout),
            config.default_startup_timeout,
        ),
        max_retry_timeout_s=said.max_retry_timeout,
        client_timeout_ms=said.client_timeout,
        job_queue_size=_first(said.job_queue_size, config.job_queue_size),
        min_workers=minimum,
        max_workers=maximum,
        batch_policy=said.batch_policy or config.batch_policy,
        weights_only=config.torch_load_weights_only if said.weights_only is None else said.weights_only,
        use_job_ticket=said.use_job_ticket,
        warnings=warnings,
    )


def _worker_limits(
    config: Config,
    yaml: ModelYaml | None,
    arguments: RegisterArguments | None,
    defaults: ModelDefaults,
    processors: int,
) -> tuple[int, int, tuple[str, ...]]:
    """The workers to start, the upper limit, and a warning where the archive's own pair is no pair."""
    warnings: tuple[str, ...] = ()
    if yaml is not None and yaml.has_worker_limits:
        return yaml.min_workers, yaml.max_workers, warnings
    if yaml is not None and (yaml.min_workers or yaml.max_workers):
        warnings = (f"Invalid model config in mar, minWorkers:{yaml.min_workers}, maxWorkers:{yaml.max_workers}",)
    if arguments is not None:
        count = max(0, _first(arguments.initial_workers, config.default_workers_per_model))
        return count, count, warnings
    fallback = 1 if config.debug else config.default_workers_per_model or processors
    minimum = _first(defaults.min_workers, fallback)
    return minimum, max(minimum, _first(defaults.max_workers, fallback)), warnings


def _first(*candidates: int | None) -> int:
    """The first that is not None; the last always is a number."""
    return next(candidate for candidate in candidates if candidate is not None)


def _positive(number: int | None) -> int | None:
    return number if number is not None and number > 0 else None


def _not_negative(number: int | None) -> int | None:
    return number if number is not None and number >= 0 else None
