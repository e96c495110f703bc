"""model-config.yaml: what one archive says of itself, and which word counts where several speak.

`parse_model_yaml` checks the mapping that the YAML reader returned; a key of the wrong type is warned of and
keeps its default. `effective_settings` joins the register call, the archive's YAML, the `models` key and the
server's defaults, in TorchServe's order of precedence (which is not the same for all settings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wsgi_ts.config import Config, ModelDefaults

DEFAULT_BATCH_SIZE = 1
DEFAULT_MAX_BATCH_DELAY_MS = 100
BATCH_POLICIES = ("adaptive", "fixed", "none")


@dataclass(frozen=True, slots=True)
class TorchrunOptions:
    """The `torchrun` section: how a model that spans several processes is launched. Times in seconds."""

    nnodes: int = 1
    nproc_per_node: int = 1
    rdzv_backend: str = "c10d"
    rdzv_endpoint: str | None = None
    rdzv_conf: str | None = None
    monitor_interval: int = 5
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    omp_number_threads: int = 1


@dataclass(frozen=True, slots=True)
class ModelYaml:
    """A checked model-config.yaml; 0 is "not given" for workers, batch size and delay, as in TorchServe.

    Times are in the unit of their YAML key: `response_timeout`, `startup_timeout` and `max_retry_timeout` in
    seconds, `max_batch_delay`, `client_timeout` and the sequence times in milliseconds. `raw` is the whole
    file, for the handler.
    """

    min_workers: int = 0
    max_workers: int = 0
    batch_size: int = 0
    max_batch_delay: int = 0
    response_timeout: int = 120
    startup_timeout: int = 120
    max_retry_timeout: int = 300
    client_timeout: int = 0
    job_queue_size: int | None = None
    use_job_ticket: bool = False
    device_type: str | None = None
    device_ids: tuple[int, ...] | None = None
    parallel_type: str = ""
    parallel_level: int = 0
    torchrun: TorchrunOptions | None = None
    sequence_batching: bool = False
    continuous_batching: bool = False
    async_communication: bool = False
    use_venv: bool = False
    sequence_max_idle: int = 0
    sequence_timeout: int = 0
    max_sequence_job_queue_size: int = 1
    max_num_sequence: int = 1
    batch_policy: str | None = None
    weights_only: bool | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def has_worker_limits(self) -> bool:
        """Whether minWorkers and maxWorkers are a pair that counts."""
        return 0 < self.min_workers <= self.max_workers


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


class _Reader:
    """Takes values out of one mapping of the file, and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, Any], prefix: str, warnings: list[str]) -> None:
        self._fields = fields
        self._prefix = prefix
        self._warnings = warnings

    def integer(self, key: str, minimum: int, otherwise: Any, *, raise_to_minimum: bool = False) -> Any:
        """A whole number from `minimum` (a smaller one is lifted to it, or refused), else `otherwise`."""

        def check(value: Any) -> int:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError("should be integer")
            if value < minimum and not raise_to_minimum:
                raise ValueError(f"should be an integer of at least {minimum}")
            return max(minimum, value)

        return self.take(key, check, otherwise)

    def boolean(self, key: str, otherwise: Any) -> Any:
        def check(value: Any) -> bool:
            if not isinstance(value, bool):
                raise ValueError("should be true or false")
            return value

        return self.take(key, check, otherwise)

    def text(self, key: str, otherwise: Any) -> Any:
        def check(value: Any) -> str:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError("should be string")
            return str(value)

        return self.take(key, check, otherwise)

    def word(self, key: str, words: tuple[str, ...], otherwise: Any) -> Any:
        def check(value: Any) -> str:
            if not isinstance(value, str) or value.lower() not in words:
                raise ValueError(f"should be {', '.join(filter(None, words[:-1]))} or {words[-1]}")
            return value.lower()

        return self.take(key, check, otherwise)

    def take(self, key: str, check: Callable[[Any], Any], otherwise: Any) -> Any:
        """The checked value of a key; `otherwise` where it is absent, null or wrong (then with a warning)."""
        value = self._fields.get(key)
        if value is None:
            return otherwise
        try:
            return check(value)
        except ValueError as error:
            self._warnings.append(f"Invalid {self._prefix}{key}: {_shown(value)}, {error}")
            return otherwise


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _device_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
        raise ValueError("should be list of integers")
    if any(item < 0 for item in value):
        raise ValueError("should be list of GPU numbers from 0")
    return tuple(value)


def _section(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("should be a section of settings")
    return value


def parse_model_yaml(fields: Mapping[str, Any]) -> ModelYaml:
    """Checks a model-config.yaml.

    Args:
        fields: the file as the YAML reader returned it; keys that the server does not know are the handler's.

    Returns:
        The settings; `warnings` holds one line for each key that was wrong and is at its default.
    """
    warnings: list[str] = []
    read = _Reader(fields, "", warnings)
    parallel_type = read.word("parallelType", ("", "pp", "tp", "pptp", "custom"), "")
    torchrun = _parse_torchrun(read.take("torchrun", _section, None), warnings)
    parallel_level = read.integer("parallelLevel", 0, 0)
    if torchrun is not None:
        parallel_level = torchrun.nproc_per_node
    return ModelYaml(
        min_workers=read.integer("minWorkers", 1, 0, raise_to_minimum=True),
        max_workers=read.integer("maxWorkers", 0, 0, raise_to_minimum=True),
        batch_size=read.integer("batchSize", 1, 0, raise_to_minimum=True),
        max_batch_delay=read.integer("maxBatchDelay", 0, 0),
        response_timeout=read.integer("responseTimeout", 1, 120),
        startup_timeout=read.integer("startupTimeout", 1, 120),
        max_retry_timeout=read.integer("maxRetryTimeoutInSec", 0, 300),
        client_timeout=read.integer("clientTimeoutInMills", 0, 0),
        job_queue_size=read.integer("jobQueueSize", 1, None),
        use_job_ticket=read.boolean("useJobTicket", False),
        device_type=read.word("deviceType", ("cpu", "gpu"), None),
        device_ids=read.take("deviceIds", _device_ids, None),
        parallel_type=parallel_type,
        parallel_level=parallel_level if parallel_type else 0,
        torchrun=torchrun,
        sequence_batching=read.boolean("sequenceBatching", False),
        continuous_batching=read.boolean("continuousBatching", False),
        async_communication=read.boolean("asyncCommunication", False),
        use_venv=read.boolean("useVenv", False),
        sequence_max_idle=read.integer("sequenceMaxIdleMSec", 0, 0),
        sequence_timeout=read.integer("sequenceTimeoutMSec", 0, 0),
        max_sequence_job_queue_size=read.integer("maxSequenceJobQueueSize", 1, 1, raise_to_minimum=True),
        max_num_sequence=read.integer("maxNumSequence", 1, 1, raise_to_minimum=True),
        batch_policy=read.word("batchPolicy", BATCH_POLICIES, None),
        weights_only=read.boolean("weightsOnly", None),
        raw=dict(fields),
        warnings=tuple(warnings),
    )


def _parse_torchrun(fields: Mapping[str, Any] | None, warnings: list[str]) -> TorchrunOptions | None:
    if fields is None:
        return None
    read = _Reader(fields, "torchrun.", warnings)
    return TorchrunOptions(
        nnodes=read.integer("nnodes", 1, 1),
        nproc_per_node=read.integer("nproc-per-node", 1, 1),
        rdzv_backend=read.text("rdzv-backend", "c10d"),
        rdzv_endpoint=read.text("rdzv-endpoint", None),
        rdzv_conf=read.text("rdzv-conf", None),
        monitor_interval=read.integer("monitor-interval", 1, 5),
        node_rank=read.integer("node-rank", 0, 0),
        master_addr=read.text("master-addr", None),
        master_port=read.integer("master-port", 0, None),
        omp_number_threads=read.integer("OMP_NUMBER_THREADS", 1, 1),
    )


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
            None if yaml is None else yaml.response_timeout,
            defaults.response_timeout,
            _not_negative(given.response_timeout),
            config.default_response_timeout,
        ),
        startup_timeout_s=_first(
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
