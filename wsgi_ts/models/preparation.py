"""From the arguments of a register call to a model version that is ready to be added to the registry."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsgi_ts.archive.model_directory import (
    RUNTIMES,
    DownloadRules,
    ModelDirectory,
    empty_model_directory,
    known_runtime,
    load_model_yaml,
    open_archive,
    remove_downloaded_archive,
    remove_model_directory,
    resolve_handler,
)
from wsgi_ts.errors import BadRequest, InvalidModel, WorkerInitializationError
from wsgi_ts.gpu.assign import Placement, place
from wsgi_ts.messages import ModelSpec
from wsgi_ts.metrics.specification import DEFAULT_FILE
from wsgi_ts.models.environment import ModelEnvironments
from wsgi_ts.models.model_yaml import (
    EffectiveSettings,
    ModelYaml,
    RegisterArguments,
    effective_settings,
    parse_model_yaml,
)
from wsgi_ts.models.parallel import check_parallel, launch_options
from wsgi_ts.models.registry import ModelVersion, Registry
from wsgi_ts.models.snapshots import RecordedModel
from wsgi_ts.process import inherited_environ
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

#: More workers of one version than this are a slip of the finger, not a wish.
MAX_WORKERS = 1024
MAX_BATCH_SIZE = 65536
_RECORDED_NUMBERS = (
    "min_workers",
    "max_workers",
    "batch_size",
    "max_batch_delay_ms",
    "response_timeout_s",
    "startup_timeout_s",
)
_NO_NAME = "Model name is not defined."


class ModelPreparer:
    """Unpacks archives and decides what holds for the model in them."""

    def __init__(self, config: Config, registry: Registry, models_dir: Path, gpus: int) -> None:
        """Keeps what every registration needs.

        Args:
            config: the configuration.
            registry: where the model will be added; gives it its index.
            models_dir: where archives are unpacked.
            gpus: GPUs that models may use.
        """
        self._config = config
        self._registry = registry
        self._models_dir = models_dir
        self._gpus = gpus
        self._rules = DownloadRules(config.allowed_urls)
        self._python = interpreter(config)
        self._environments = ModelEnvironments(self._python, inherited_environ(), lambda: registry.draining)

    def open(self, url: str, model_name: str | None, *, at_startup: bool, s3_sse_kms: bool = False) -> ModelDirectory:
        """Finds and unpacks an archive; `discard` removes what it made.

        Args:
            url: the archive.
            model_name: in place of the manifest's.
            at_startup: the operator names the archive: where neither call nor manifest names the model it is named
                after the file, and a directory may lie outside of the model store.
            s3_sse_kms: the object in S3 is encrypted with a key of KMS.
        """
        rules = replace(self._rules, s3_sse_kms=s3_sse_kms)

        def attempt(name: str | None) -> ModelDirectory:
            return open_archive(
                url,
                self._config.model_store,
                self._models_dir,
                rules=rules,
                model_name=name or None,
                any_directory=at_startup,
            )

        try:
            return attempt(model_name)
        except InvalidModel as error:
            if not at_startup or error.message != _NO_NAME:
                raise
        return attempt(re.sub(r"\W", "_", Path(url).name.split(".")[0]))

    def reopen(self, recorded: RecordedModel) -> ModelDirectory:
        """Unpacks the archive of a model of a snapshot."""
        directory = self.open(recorded.url, recorded.name, at_startup=True)
        store = self._config.model_store
        if recorded.downloaded and store is not None and directory.extracted:
            directory = replace(directory, downloaded=store / recorded.archive)
        return directory

    def empty(self, recorded: RecordedModel) -> ModelDirectory:
        """A directory without code, for a model of a snapshot whose archive is damaged."""
        return empty_model_directory(self._models_dir, recorded.name, recorded.version, recorded.url)

    def prepare(
        self,
        directory: ModelDirectory,
        arguments: RegisterArguments | None,
        *,
        handler: str | None,
        runtime: str | None,
        recorded: RecordedModel | None = None,
    ) -> tuple[ModelVersion, EffectiveSettings]:
        """Makes the version that an unpacked archive holds, with an index of its own, and its settings.

        Args:
            directory: the archive.
            arguments: numbers of the register call; None for a model of the configuration or of a snapshot.
            handler: in place of the manifest's.
            runtime: in place of the manifest's.
            recorded: what a snapshot says of it; its numbers count before all others.
        """
        if handler:
            handler = resolve_handler(handler, directory.path)
        manifest = directory.manifest
        name, version = manifest.model_name, manifest.model_version
        self._registry.check_absent(name, version)
        runtime = known_runtime(runtime) or manifest.runtime
        if runtime == "LSP":
            raise BadRequest("Runtime LSP is not supported by this server: it runs Python handlers only.")
        yaml = _read_yaml(directory)
        if yaml is not None:
            check_parallel(yaml)
        placement = place(
            self._gpus,
            yaml.device_type if yaml else None,
            yaml.device_ids if yaml else None,
            yaml.parallel_level if yaml else 0,
        )
        settings = effective_settings(
            self._config, yaml, arguments, name, version, cores=len(os.sched_getaffinity(0)), gpus=self._gpus
        )
        for warning in (*(yaml.warnings if yaml else ()), *placement.warnings, *settings.warnings):
            log.warning("%s %s: %s", name, version, warning)
        if recorded is not None:
            settings = _as_recorded(settings, recorded)
        check_count("initial_workers", settings.min_workers)
        holders = self._registry.gpu_holders()
        least, most = limit_workers(placement, name, settings.min_workers, settings.max_workers, holders)
        settings = replace(settings, min_workers=least, max_workers=most)
        python = self._interpreter(directory, use_venv=yaml is not None and yaml.use_venv)
        spec = self._spec(directory, yaml, runtime, handler, settings, python)
        return ModelVersion(spec, directory, yaml, placement), settings

    def _interpreter(self, directory: ModelDirectory, *, use_venv: bool) -> str | None:
        """The interpreter of the model's workers; None: they are forks of the worker template."""
        manifest = directory.manifest
        requirements = manifest.requirements_file if self._config.install_py_dep_per_model else None
        if requirements or use_venv:
            return self._environments.provide(manifest.model_name, directory.path, requirements)
        return None if self._python == sys.executable else self._python

    def _spec(
        self,
        directory: ModelDirectory,
        yaml: ModelYaml | None,
        runtime: str,
        handler: str | None,
        settings: EffectiveSettings,
        python: str | None,
    ) -> ModelSpec:
        config, manifest = self._config, directory.manifest
        torchrun = launch_options(yaml) if yaml else None
        model_entry = manifest.raw.get("model", {})
        return ModelSpec(
            index=self._registry.allocate_index(),
            name=manifest.model_name,
            version=manifest.model_version,
            model_dir=str(directory.path),
            handler=handler or manifest.handler or config.default_service_handler or "",
            manifest=manifest.raw or None,
            config_file=manifest.config_file,
            runtime=runtime,
            envelope=model_entry.get("envelope") or config.service_envelope,
            batch_size=settings.batch_size,
            max_batch_delay_ms=settings.max_batch_delay_ms,
            batch_policy=settings.batch_policy,
            response_timeout_s=settings.response_timeout_s,
            startup_timeout_s=settings.startup_timeout_s,
            max_retry_timeout_s=settings.max_retry_timeout_s,
            client_timeout_ms=settings.client_timeout_ms,
            job_queue_size=settings.job_queue_size,
            use_job_ticket=settings.use_job_ticket,
            decode_input_request=config.decode_input_request,
            limit_max_image_pixels=config.limit_max_image_pixels,
            weights_only=settings.weights_only,
            max_response_bytes=config.max_response_size,
            metrics_config=str(config.metrics_config or DEFAULT_FILE),
            python=python,
            parallel_type=yaml.parallel_type if yaml else "",
            ranks=torchrun.nproc_per_node if torchrun else 0,
            torchrun=dataclasses.asdict(torchrun) if torchrun else None,
            async_communication=yaml.async_communication if yaml else False,
            continuous_batching=yaml.continuous_batching if yaml else False,
            **(_sequence_settings(yaml, settings) if yaml else {}),
        )


def _sequence_settings(yaml: ModelYaml, settings: EffectiveSettings) -> dict[str, Any]:
    """The fields of a ModelSpec that make a model stateful."""
    return {
        "sequence_batching": yaml.sequence_batching,
        "sequence_max_idle_ms": yaml.sequence_max_idle,
        "sequence_timeout_ms": yaml.sequence_timeout,
        "max_sequences": yaml.sequence_limit,
        "max_sequence_queue": yaml.max_sequence_job_queue_size,
        "min_workers": settings.min_workers,
        "max_workers": settings.max_workers,
    }


def interpreter(config: Config) -> str:
    """The interpreter that the key `python` names, with its path; `sys.executable` where that is the one."""
    found = shutil.which(config.python) or config.python
    # A virtual environment has several names of one file, and shares that file with others.
    same_folder = os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)
    return sys.executable if same_folder and _is_same_file(found, sys.executable) else found


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def check_arguments(arguments: RegisterArguments) -> None:
    """Refuses numbers of a register call that cannot be meant.

    Raises:
        BadRequest: one is absurdly large.
    """
    if (arguments.batch_size or 0) > MAX_BATCH_SIZE:
        raise BadRequest(f"Parameter batch_size must not be larger than {MAX_BATCH_SIZE}.")
    if (arguments.initial_workers or 0) > MAX_WORKERS:
        raise BadRequest(f"Parameter initial_workers must not be larger than {MAX_WORKERS}.")


def check_runtime(runtime: str | None) -> None:
    """Refuses a runtime that nobody knows.

    Raises:
        BadRequest: it is none of TorchServe's.
    """
    if runtime is not None and known_runtime(runtime) not in RUNTIMES:
        raise BadRequest(f"Invalid RuntimeType value: {runtime}")


def check_count(key: str, count: int) -> None:
    """Refuses a number of workers that cannot be meant.

    Raises:
        BadRequest: negative or absurdly large.
    """
    if not 0 <= count <= MAX_WORKERS:
        raise BadRequest(f"Parameter {key} must be a number from 0 to {MAX_WORKERS}.")


def limit_workers(
    placement: Placement, name: str, least: int, most: int, holders: Mapping[int, Sequence[str]]
) -> tuple[int, int]:
    """Caps the workers of a model whose workers take several GPUs each.

    Args:
        placement: where the model may run.
        name: the model's name.
        least: workers that are wanted.
        most: workers at most.
        holders: for each GPU the workers that have it, for the message.

    Raises:
        WorkerInitializationError: not even one fits.
    """
    limit = placement.worker_limit
    if limit is None:
        return least, most
    if limit == 0:
        level = placement.parallel_level
        devices = placement.device_ids or range(placement.usable_gpus)
        held = "; ".join(f"GPU {gpu}: {', '.join(holders.get(gpu, ())) or 'free'}" for gpu in devices)
        raise WorkerInitializationError(
            f"No enough gpu devices for model:{name} parallelLevel:{level}. "
            f"A worker needs {level}, the model may use {placement.usable_gpus} ({held})."
        )
    return min(least, limit), min(most, limit)


def _as_recorded(settings: EffectiveSettings, recorded: RecordedModel) -> EffectiveSettings:
    numbers = {name: getattr(recorded, name) for name in _RECORDED_NUMBERS}
    settings = replace(settings, **{name: number for name, number in numbers.items() if number is not None})
    return replace(settings, max_workers=max(settings.min_workers, settings.max_workers))


def _read_yaml(directory: ModelDirectory) -> ModelYaml | None:
    file = directory.manifest.config_file
    fields = load_model_yaml(directory.path / file) if file else {}
    return parse_model_yaml(fields) if fields else None


def discard(directory: ModelDirectory) -> None:
    """Removes the files of a model that is not registered (any more), the downloaded archive included."""
    try:
        remove_model_directory(directory)
        remove_downloaded_archive(directory)
    except OSError as error:
        log.warning("Cannot remove the unpacked archive %s: %s", directory.path, error)
