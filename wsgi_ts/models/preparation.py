"""From the arguments of a register call to a model version that is ready to be added to the registry."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsgi_ts.archive.download import DownloadRules, Fetchers
from wsgi_ts.archive.entries import escape_name
from wsgi_ts.archive.extract import NO_ARCHIVE
from wsgi_ts.archive.manifest import Manifest, load_model_yaml, resolve_handler
from wsgi_ts.archive.model_directory import (
    ModelDirectory,
    empty_model_directory,
    open_archive,
    remove_downloaded_archive,
    remove_model_directory,
)
from wsgi_ts.cgroup import usable_cores
from wsgi_ts.errors import BadRequest, InvalidModel
from wsgi_ts.gpu.assign import place
from wsgi_ts.messages import ModelSpec
from wsgi_ts.metrics.specification import DEFAULT_FILE
from wsgi_ts.models.arguments import RegisterArguments, check_count
from wsgi_ts.models.effective_settings import EffectiveSettings, effective_settings
from wsgi_ts.models.environment import ModelEnvironments, interpreter
from wsgi_ts.models.handler_imports import Needs, needs_of
from wsgi_ts.models.model_yaml import ModelYaml, check_parallel, launch_options, parse_model_yaml
from wsgi_ts.models.recorded import RecordedModel
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.models.workers import limit_workers
from wsgi_ts.process import inherited_environ
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.model_entries import known_runtime

log = logging.getLogger(__name__)

#: Requests that a workflow's functions are given at a time; each is answered by itself.
MOST_CALLS = 16
_NO_NAME = "Model name is not defined."


class ModelPreparer:
    """Unpacks archives and decides what holds for the model in them.

    Args:
        registry: where the model will be added; gives it its index.
        fetchers: plugins that fetch archives; None for none.
        in_process: handlers are loaded in this process, so that no environment is made for them.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        models_dir: Path,
        gpus: int,
        fetchers: Fetchers | None = None,
        *,
        in_process: bool = False,
    ) -> None:
        self._fetchers = fetchers
        self._in_process = in_process
        self._config = config
        self._registry = registry
        self._models_dir = models_dir
        self._gpus = gpus
        self._python = interpreter(config)
        self._environments = ModelEnvironments(self._python, inherited_environ(), lambda: registry.draining)

    def open(self, arguments: RegisterArguments, *, at_startup: bool, fetched: str = "") -> ModelDirectory:
        """Finds and unpacks an archive; `discard` removes what it made.

        `at_startup`: the operator names the archive. Where neither call nor manifest names the model it is named after
        the file then, and a directory may lie outside of the model store. `fetched`: what its URL leads to was fetched
        into this file of the store by an earlier process; it is fetched again only where that has gone.
        """
        url, store = arguments.url or "", self._config.model_store
        if fetched and store is not None and os.path.isfile(store / fetched):
            directory = self.open(replace(arguments, url=fetched), at_startup=at_startup)
            return replace(directory, url=url, downloaded=store / fetched)

        def attempt(name: str | None) -> ModelDirectory:
            return open_archive(
                url,
                self._config.model_store,
                self._models_dir,
                rules=DownloadRules(
                    self._config.allowed_urls, s3_sse_kms=arguments.s3_sse_kms, fetchers=self._fetchers
                ),
                model_name=name or None,
                any_directory=at_startup,
            )

        try:
            return attempt(arguments.model_name)
        except InvalidModel as error:
            if error.message == NO_ARCHIVE and not arguments.model_name and not at_startup:
                # TorchServe finds no files in it, so no manifest, so no name.
                log.warning("%s: %s", escape_name(url), NO_ARCHIVE)
                raise InvalidModel(_NO_NAME) from error
            if not at_startup or error.message != _NO_NAME:
                raise
        return attempt(re.sub(r"\W", "_", Path(url).name.split(".")[0]))

    def reopen(self, recorded: RecordedModel) -> ModelDirectory:
        """Unpacks the archive of a model of a snapshot; a directory without code where it cannot be read any more."""
        try:
            directory = self.open(RegisterArguments(recorded.url, recorded.name), at_startup=True)
        except InvalidModel as error:
            told = "The archive %s of model %s cannot be read (%s): no worker of it will start"
            log.error(told, recorded.url, recorded.name, error.message)
            return empty_model_directory(self._models_dir, recorded.name, recorded.version, recorded.url)
        version = directory.manifest.model_version
        if version != recorded.version:
            told = "Model %s: the snapshot has version %s, its archive %s now has version %s"
            log.warning(told, recorded.name, recorded.version, recorded.url, version)
        store = self._config.model_store
        if recorded.downloaded and store is not None and directory.extracted:
            directory = replace(directory, downloaded=store / recorded.archive)
        return directory

    def reread(self, recorded: RecordedModel, index: int) -> ModelVersion:
        """Makes a registered version anew from its files as they are now, with its number on the data path.

        Raises:
            ServerError: the files are no model (any more), or those of another version.
        """
        directory = self.open(RegisterArguments(recorded.url, recorded.name), at_startup=True)
        try:
            version = directory.manifest.model_version
            if version != recorded.version:
                raise InvalidModel(f"{recorded.url} is version {version} now: register it")
            return self.prepare(directory, recorded, index)
        except BaseException:
            remove_model_directory(directory)
            raise

    def prepare(
        self, directory: ModelDirectory, said: RegisterArguments | RecordedModel | None, index: int | None = None
    ) -> ModelVersion:
        """Makes the version that an unpacked archive holds.

        Args:
            directory: the archive.
            said: what the register call says, or a snapshot, whose numbers count before all others; None for a model of
                the configuration.
            index: its number on the data path where it is registered already; by default it gets a new one.
        """
        name, version = directory.manifest.model_name, directory.manifest.model_version
        handler = resolve_handler(said.handler, directory.path) if said is not None and said.handler else None
        if index is None:
            self._registry.check_absent(name, version)
        runtime = known_runtime(said.runtime if said is not None else None) or directory.manifest.runtime
        if runtime == "LSP":
            raise BadRequest("Runtime LSP is not supported by this server: it runs Python handlers only.")
        yaml = _read_yaml(directory)
        of_file = yaml or ModelYaml()
        placement = place(self._gpus, of_file.device_type, of_file.device_ids, of_file.parallel_level)
        settings = effective_settings(
            self._config,
            yaml,
            said if isinstance(said, RegisterArguments) else None,
            name,
            version,
            cores=usable_cores(),
            gpus=self._gpus,
        )
        for warning in (*of_file.warnings, *placement.warnings, *settings.warnings):
            log.warning("%s %s: %s", name, version, warning)
        if isinstance(said, RecordedModel):
            numbers: dict[str, Any] = {**said.numbers, **said.tuned}
            settings = replace(settings, **numbers)
            settings = replace(settings, max_workers=max(settings.min_workers, settings.max_workers))
        check_count("initial_workers", settings.min_workers)
        holders = self._registry.gpu_holders()
        least, most = limit_workers(placement, name, settings.min_workers, settings.max_workers, holders)
        settings = replace(settings, min_workers=least, max_workers=most)
        python = self._interpreter(directory, use_venv=of_file.use_venv)
        index = self._registry.numbers.allocate_index() if index is None else index
        spec = self._spec(index, directory, of_file, runtime, handler, settings, python)
        return ModelVersion(spec, directory, yaml, placement)

    def prepare_functions(
        self,
        workflow: str,
        name: str,
        directory: Path,
        handler: str,
        functions: dict[str, dict[str, Any]],
        arguments: RegisterArguments,
    ) -> ModelVersion:
        """Makes the version whose workers run the functions of a workflow.

        Args:
            workflow: the workflow.
            name: what it is called; no other model or function is.
            directory: its files.
            handler: the file with the functions.
            functions: `ModelSpec.functions`.
            arguments: the time-outs, and where the files are from.
        """
        config = self._config
        manifest = Manifest(name)
        self._registry.check_absent(name, manifest.model_version)
        yaml = ModelYaml()
        placement = place(self._gpus, yaml.device_type, yaml.device_ids, yaml.parallel_level)
        settings = effective_settings(config, None, arguments, name, manifest.model_version, cores=1, gpus=self._gpus)
        index, *rows = self._registry.numbers.allocate_indexes(1 + len(functions))
        counted = zip(functions.items(), rows, strict=True)
        spec = ModelSpec(
            index=index,
            name=name,
            version=manifest.model_version,
            model_dir=str(directory),
            handler=handler,
            manifest=None,
            batch_size=MOST_CALLS,
            max_batch_delay_ms=0,
            batch_policy="none",
            response_timeout_s=settings.response_timeout_s,
            startup_timeout_s=settings.startup_timeout_s,
            job_queue_size=settings.job_queue_size * len(functions),
            decode_input_request=config.decode_input_request,
            limit_max_image_pixels=config.limit_max_image_pixels,
            max_response_bytes=config.max_response_size,
            metrics_config=str(config.metrics_config or DEFAULT_FILE),
            python=None if self._python == sys.executable else self._python,
            functions={key: {**function, "row": row} for (key, function), row in counted},
        )
        files = ModelDirectory(directory, manifest, arguments.url or "", extracted=False)
        return ModelVersion(spec, files, None, placement, workflow=workflow)

    def _interpreter(self, directory: ModelDirectory, *, use_venv: bool) -> str | None:
        """The interpreter of the model's workers; None: they are forks of the worker template."""
        if self._in_process:
            return None
        manifest = directory.manifest
        requirements = manifest.requirements_file if self._config.install_py_dep_per_model else None
        if requirements or use_venv:
            return self._environments.provide(manifest.model_name, directory.path, requirements)
        return None if self._python == sys.executable else self._python

    def _spec(
        self,
        index: int,
        directory: ModelDirectory,
        yaml: ModelYaml,
        runtime: str,
        handler: str | None,
        settings: EffectiveSettings,
        python: str | None,
    ) -> ModelSpec:
        config, manifest = self._config, directory.manifest
        torchrun = launch_options(yaml)
        handler = handler or manifest.handler or config.default_service_handler or ""
        # Another interpreter has nothing of the template, and torchrun is a part of torch.
        needs = Needs(preloaded=False, numpy=False) if python else needs_of(handler, directory.path)
        envelope = manifest.raw.get("model", {}).get("envelope") or config.service_envelope
        # What the file alone says, and then what several may say: fields of the same name.
        by_name = {
            each.name: getattr(source, each.name)
            for source in (yaml, settings)
            for each in dataclasses.fields(ModelSpec)
            if hasattr(source, each.name) and each.name != "torchrun"
        }
        return ModelSpec(
            index=index,
            name=manifest.model_name,
            version=manifest.model_version,
            model_dir=str(directory.path),
            handler=handler,
            manifest=manifest.raw or None,
            config_file=manifest.config_file,
            runtime=runtime,
            envelope=envelope,
            decode_input_request=config.decode_input_request,
            limit_max_image_pixels=config.limit_max_image_pixels,
            max_response_bytes=config.max_response_size,
            metrics_config=str(config.metrics_config or DEFAULT_FILE),
            python=python,
            ranks=torchrun.nproc_per_node if torchrun else 0,
            torchrun=dataclasses.asdict(torchrun) if torchrun else None,
            needs_preloaded=torchrun is not None or needs.preloaded,
            # Some envelopes make arrays of what they unpack.
            needs_numpy=needs.numpy or (envelope is not None and python is None),
            **by_name,
        )


def _read_yaml(directory: ModelDirectory) -> ModelYaml | None:
    file = directory.manifest.config_file
    fields = load_model_yaml(directory.path / file) if file else None
    if not fields:
        return None
    yaml = parse_model_yaml(fields)
    check_parallel(yaml)
    return yaml


def discard(directory: ModelDirectory) -> None:
    """Removes the files of a model that is not registered (any more), the downloaded archive included."""
    try:
        remove_model_directory(directory)
        remove_downloaded_archive(directory)
    except OSError as error:
        log.warning("Cannot remove the unpacked archive %s: %s", directory.path, error)
