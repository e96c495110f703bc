"""Which word counts where several speak of one setting of a model.

The register call, the archive's model-config.yaml, the `models` key and the server's own settings are joined in
TorchServe's order of precedence, which is not the same for all settings.
"""

from __future__ import annotations

from collections.abc import Mapping

from wsgi_ts.models.arguments import RegisterArguments
from wsgi_ts.models.model_yaml import ModelYaml
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.table import settings_of

#: With `debug` workers have this long for everything, so that they can be stopped in a debugger: a week.
DEBUG_TIMEOUT_S = 7 * 86400
_BATCH_SIZE, _DELAY_MS = (settings_of(RegisterArguments)[name].default for name in ("batch_size", "max_batch_delay"))


@dataclass(frozen=True, slots=True)
class EffectiveSettings:
    """What holds for one model version, by the names of ModelSpec.

    `min_workers` is the number of workers to start; `max_workers` the limit that describe-model shows.
    """

    batch_size: int
    max_batch_delay_ms: int
    response_timeout_s: int
    startup_timeout_s: int
    job_queue_size: int
    min_workers: int
    max_workers: int
    batch_policy: str
    weights_only: bool
    threads_per_worker: int
    warnings: tuple[str, ...] = ()


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

    `arguments` is None for a model loaded at startup. Of such a model of which nobody says anything there are as many
    workers as usable `gpus`, where there are any, else as CPU `cores`.
    """
    given = arguments or RegisterArguments()
    said = yaml or ModelYaml()
    defaults = config.model_defaults(name, version)
    minimum, maximum, warnings = _worker_limits(config, said, arguments, defaults, gpus or cores)
    if version not in config.models.get(name, {version: {}}):
        spoken_of = ", ".join(config.models[name]) or "none"
        warnings += (f"The key models says nothing of version {version}; its versions of this model: {spoken_of}",)
    return EffectiveSettings(
        batch_size=_first(
            _at_least(1, given.batch_size), said.batch_size or None, defaults.get("batchSize"), _BATCH_SIZE
        ),
        max_batch_delay_ms=_first(
            _at_least(0, given.max_batch_delay),
            said.max_batch_delay_ms or None,
            defaults.get("maxBatchDelay"),
            _DELAY_MS,
        ),
        response_timeout_s=_timeout("response_timeout", config, yaml, given, defaults.get("responseTimeout")),
        startup_timeout_s=_timeout("startup_timeout", config, yaml, given, defaults.get("startupTimeout")),
        job_queue_size=_first(said.job_queue_size, config.job_queue_size),
        min_workers=minimum,
        max_workers=maximum,
        batch_policy=said.batch_policy or config.batch_policy,
        weights_only=config.torch_load_weights_only if said.weights_only is None else said.weights_only,
        threads_per_worker=said.threads_per_worker,
        warnings=warnings,
    )


def _timeout(name: str, config: Config, yaml: ModelYaml | None, given: RegisterArguments, default: int | None) -> int:
    """A time-out in seconds, by the name that file and call have for it; the file speaks by its own defaults, too."""
    return _first(
        DEBUG_TIMEOUT_S if config.debug else None,
        None if yaml is None else getattr(yaml, f"{name}_s"),
        default,
        _at_least(0, getattr(given, name)),
        getattr(config, f"default_{name}"),
    )


def _worker_limits(
    config: Config, yaml: ModelYaml, arguments: RegisterArguments | None, defaults: Mapping[str, int], processors: int
) -> tuple[int, int, tuple[str, ...]]:
    """The workers to start, the upper limit, and a warning where the archive's own pair is no pair."""
    warnings: tuple[str, ...] = ()
    if 0 < yaml.min_workers <= yaml.max_workers:
        return yaml.min_workers, yaml.max_workers, warnings
    if yaml.min_workers or yaml.max_workers:
        warnings = (f"Invalid model config in mar, minWorkers:{yaml.min_workers}, maxWorkers:{yaml.max_workers}",)
    if arguments is not None:
        count = max(0, _first(arguments.initial_workers, config.default_workers_per_model))
        return count, count, warnings
    fallback = 1 if config.debug else config.default_workers_per_model or processors
    minimum = _first(defaults.get("minWorkers"), fallback)
    return minimum, max(minimum, _first(defaults.get("maxWorkers"), fallback)), warnings


def _first(*candidates: int | None) -> int:
    """The first that is not None; the last always is a number."""
    return next(candidate for candidate in candidates if candidate is not None)


def _at_least(minimum: int, number: int | None) -> int | None:
    return number if number is not None and number >= minimum else None
