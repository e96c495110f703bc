"""Where settings come from: finds the configuration file, joins it with environment and command line.

What counts where several speak: environment (only if the file says `enable_envvars_config=true`) before
command line before file before default. Used by the launcher and by `wsgi-ts doctor`; stays light, since
every command pays for it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wsgi_ts.cgroup import usable_cores
from wsgi_ts.logs.text import safe_text
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.run_files import default_run_dir
from wsgi_ts.settings.address import Address
from wsgi_ts.settings.config import Config, ConfigError, property_settings
from wsgi_ts.settings.kinds import BOOLEAN, OIP, UnclearValue, is_true
from wsgi_ts.settings.model_entries import ENTRY_KEYS, unknown_settings
from wsgi_ts.settings.properties import PropertiesError, parse_properties, substitute_variables
from wsgi_ts.settings.stores import names_in, startup_archives, startup_workflows

_MAX_FILE_BYTES = 16 * 1024 * 1024
#: The name of a snapshot: local time to the millisecond, and what it was written for.
SNAPSHOT_NAME = re.compile(r"([0-9]{17})-(startup|snapshot|shutdown)\.cfg")
#: What TorchServe writes into its snapshots besides settings.
SNAPSHOT_NOTES = frozenset({"version", "tsConfigFile", "NUM_WORKERS", "number_of_cpu"})


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What the flags gave; None or False where a flag was not there. Lists are as the shell split them."""

    ts_config: str | None = None
    model_store: str | None = None
    workflow_store: str | None = None
    models: Sequence[str] | None = None
    workflows: Sequence[str] | None = None
    log_config: str | None = None
    cpp_log_config: str | None = None
    plugins_path: str | None = None
    no_config_snapshots: bool = False
    disable_token_auth: bool = False
    enable_model_api: bool = False
    reload: bool = False
    drain_delay: str | None = None
    drain_timeout: str | None = None
    log_format: str | None = None
    run_dir: str | None = None

    def keys(self) -> dict[str, Given]:
        """The flags as keys of config.properties."""
        texts = {
            ("model_store", "--model-store"): self.model_store,
            ("workflow_store", "--workflow-store"): self.workflow_store,
            ("load_models", "--models"): None if self.models is None else ",".join(self.models),
            ("load_workflows", "--workflows"): None if self.workflows is None else ",".join(self.workflows),
            ("cpp_log_config", "--cpp-log-config"): self.cpp_log_config,
            ("plugins_path", "--plugins-path"): self.plugins_path,
            ("drain_delay", "--drain-delay"): self.drain_delay,
            ("graceful_timeout", "--drain-timeout"): self.drain_timeout,
            ("log_format", "--log-format"): self.log_format,
            ("disable_token_authorization", "--disable-token-auth"): "true" if self.disable_token_auth else None,
            ("enable_model_api", "--enable-model-api"): "true" if self.enable_model_api else None,
            ("reload", "--reload"): "true" if self.reload else None,
        }
        return {key: Given(text, flag) for (key, flag), text in texts.items() if text is not None}


@dataclass(frozen=True, slots=True)
class Given:
    """The text of one key, and where it stood ("config.properties:12: key max_request_size")."""

    text: str
    where: str


def load_config(command_line: CommandLine, environ: Mapping[str, str]) -> Config:
    """The configuration of an instance that is to be started; raises ConfigError where it cannot be used."""
    warnings: list[str] = []
    temp_dir = _temp_dir(environ)
    log_dir = _location(environ, "LOG_LOCATION", temp_dir, warnings)
    log_config = _log_config(command_line.log_config)
    path = find_config_file(command_line, environ, log_dir)
    given = _read_file(path, environ, warnings) if path is not None else {}
    from_file = dict(given)
    given |= command_line.keys()
    given |= _from_environment(from_file, environ, has_file=path is not None)
    _complete_tokens(given, environ)
    values = _parse_values(given, warnings)
    values.update(
        config_file=None if path is None else _absolute(path),
        no_config_snapshots=command_line.no_config_snapshots,
        log_config=log_config or _log_config_of_vmargs(values, given),
        log_dir=log_dir,
        metrics_dir=_location(environ, "METRICS_LOCATION", temp_dir, warnings),
        temp_dir=temp_dir,
        run_dir=default_run_dir(temp_dir) if command_line.run_dir is None else _absolute(command_line.run_dir),
    )
    _complete_stores(values, given)
    _complete_models(values, given)
    _complete_web_workers(values, warnings)
    warnings += _without_effect(given)
    warnings += _unknown_model_settings(values, given)
    origins = {key: source.where.removesuffix(f": key {key}") for key, source in given.items()}
    config = Config(**values, warnings=tuple(map(safe_text, warnings)), origins=origins)
    _check_addresses(config, given)
    _check_log_config(config, environ)
    return config


def find_config_file(command_line: CommandLine, environ: Mapping[str, str], log_dir: Path) -> str | None:
    """The file to read: TS_CONFIG_FILE, --ts-config, the newest snapshot, ./config.properties, or none.

    Raises:
        ConfigError: the file that was named is not there.
    """
    named = environ.get("TS_CONFIG_FILE") or command_line.ts_config
    if named:
        if not os.path.isfile(named):
            origin = " (from the environment variable TS_CONFIG_FILE)" if environ.get("TS_CONFIG_FILE") else ""
            raise ConfigError(f"--ts-config file not found: {named}{origin}")
        return named
    if not command_line.no_config_snapshots:
        snapshots = [name for name in names_in(log_dir / "config") if SNAPSHOT_NAME.fullmatch(name)]
        if snapshots:
            return str(log_dir / "config" / max(snapshots))
    return "config.properties" if os.path.isfile("config.properties") else None


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _temp_dir(environ: Mapping[str, str]) -> Path:
    temp = environ.get("TEMP")
    if not temp:
        return Path(tempfile.gettempdir())
    if not os.path.isdir(temp):
        raise ConfigError(f"Invalid temp directory: {temp}, please check TEMP environment variable.")
    return _absolute(temp)


def _location(environ: Mapping[str, str], variable: str, temp_dir: Path, warnings: list[str]) -> Path:
    """Where log files go: where the variable says, else into the current directory, or where that is read-only not."""
    named = environ.get(variable)
    if named or os.access("logs", os.W_OK) or (not os.path.exists("logs") and os.access(".", os.W_OK)):
        return _absolute(named or "logs")
    place = temp_dir / "logs"
    warnings.append(f"the current directory cannot be written: logs go to {place}; {variable} names another place")
    return place


def _log_config(path: str | None) -> Path | None:
    if path is None:
        return None
    if not os.path.isfile(path):
        raise ConfigError(f"--log-config file not found: {path}")
    return _absolute(path)


def _read_file(path: str, environ: Mapping[str, str], warnings: list[str]) -> dict[str, Given]:
    """The keys of the file; unknown ones are warned of and left out."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; this is no configuration file")
    try:
        properties = parse_properties(data)
    except PropertiesError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    known = property_settings()
    given: dict[str, Given] = {}
    for entry in properties:
        where = f"{path}:{entry.line}: key {entry.key}"
        if entry.key not in known:
            if entry.key not in SNAPSHOT_NOTES:
                warnings.append(f"{path}:{entry.line}: unknown key {entry.key!r} is ignored{nearest(entry.key, known)}")
            continue
        if entry.key in given:
            warnings.append(f"{where} is given again; this line counts, the one before does not")
        try:
            given[entry.key] = Given(substitute_variables(entry.value, environ), where)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; set it, or change the value") from None
    return given


def nearest(key: str, known: Iterable[str]) -> str:
    """Half a sentence with the known key that a misspelt one resembles; "" where none does."""
    from difflib import get_close_matches  # only a mistake pays for it

    # Keys of config.properties are in lower case; those of a model are not.
    spelt = {each.lower(): each for each in known}
    close = get_close_matches(key.lower(), spelt, n=1)
    return f"; did you mean {spelt[close[0]]}?" if close else ""


def _from_environment(
    from_file: Mapping[str, Given], environ: Mapping[str, str], *, has_file: bool
) -> dict[str, Given]:
    def says_true(key: str) -> bool:
        return key in from_file and is_true(from_file[key].text)

    # A container may have nothing but its environment; where there is a file, that decides.
    by_variable = not has_file and is_true(environ.get("TS_ENABLE_ENVVARS_CONFIG", ""))
    all_count = says_true("enable_envvars_config") or by_variable
    given = {}
    for name, row in property_settings().items():
        variable = row.variable(name)
        if variable is not None and variable in environ and (all_count or row.env_always):
            given[name] = Given(environ[variable], f"environment variable {variable}")
    if (by_variable or says_true("use_env_allowed_urls")) and "TS_ALLOWED_URLS" in environ:
        given["allowed_urls"] = Given(environ["TS_ALLOWED_URLS"], "environment variable TS_ALLOWED_URLS")
    _take_opentelemetry(given, from_file, environ)
    if "K_SERVICE" in environ and "PORT" in environ and "inference_address" not in {*given, *from_file}:
        given["inference_address"] = Given(f"http://0.0.0.0:{environ['PORT']}", "environment variable PORT")
    return given


def _take_opentelemetry(given: dict[str, Given], from_file: Mapping[str, Given], environ: Mapping[str, str]) -> None:
    """OpenTelemetry's own variables count where the keys are not given: they are the same for all programs of a pod."""
    off = is_true(environ.get("OTEL_SDK_DISABLED", "")) or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if environ.get(variable) and not off and "otlp_endpoint" not in {*given, *from_file}:
            given["otlp_endpoint"] = Given(environ[variable], f"environment variable {variable}")
    sampler = environ.get("OTEL_TRACES_SAMPLER", "").removeprefix("parentbased_")
    ratios = {"always_on": "1", "always_off": "0", "traceidratio": environ.get("OTEL_TRACES_SAMPLER_ARG", "1")}
    if sampler in ratios and "trace_sample_ratio" not in {*given, *from_file}:
        given["trace_sample_ratio"] = Given(ratios[sampler], "environment variable OTEL_TRACES_SAMPLER")


def _complete_tokens(given: dict[str, Given], environ: Mapping[str, str]) -> None:
    """Who asks for tokens gets them: the variable also counts without `enable_envvars_config`, if nobody disagrees.

    It cannot switch tokens off so: in TorchServe, where they are on by default, it has no effect then.
    """
    key, variable = "disable_token_authorization", "TS_DISABLE_TOKEN_AUTHORIZATION"
    if key not in given and environ.get(variable, "").strip().lower() == "false":
        given[key] = Given(environ[variable], f"environment variable {variable}")


def _parse_values(given: Mapping[str, Given], warnings: list[str]) -> dict[str, Any]:
    """The values of the keys that were given; what stops no TorchServe is warned of."""
    known = property_settings()
    values: dict[str, Any] = {}
    for key, source in given.items():
        kind, default = known[key].kind, known[key].default
        # Java keeps blanks at the end of a line, where nobody sees them; no value needs them, and "true " is not true.
        is_boolean = kind in (BOOLEAN, OIP)
        text = source.text if is_boolean else source.text.strip()
        # Nothing is false, too; where our default is neither, TorchServe's is false, so it says nothing.
        if not text and kind.empty != "value" and (not is_boolean or default is None):
            if kind.empty == "warned":
                warnings.append(f"{source.where}: is empty and taken as not given")
            continue
        try:
            values[key] = kind.parse(text)
        except UnclearValue as error:
            if error.instead is not None:
                values[key] = error.instead
            warnings.append(f"{source.where}: {error}; {_what_counts(default, error.instead)}")
        except ValueError as error:
            raise ConfigError(f"{source.where}: {error}") from None
    return values


def _what_counts(default: Any, instead: Any) -> str:
    if instead is not None:
        return f"taken for {str(instead).lower()}, as in TorchServe"
    return "taken as not given" if default is None else f"the default is used: {default}"


def _complete_stores(values: dict[str, Any], given: Mapping[str, Given]) -> None:
    if "model_store" not in values:
        raise ConfigError("Missing mandatory parameter --model-store")
    values.setdefault("workflow_store", values["model_store"])
    for key in ("model_store", "workflow_store"):
        if key in given and not values[key].is_dir():
            where = given[key].where
            prefix = where if where.startswith("--") else f"{where}:"
            raise ConfigError(f"{prefix} directory not found: {given[key].text.strip()}")
    if "cpp_log_config" in values and not values["cpp_log_config"].is_file():
        raise ConfigError(f"--cpp-log-config file not found: {given['cpp_log_config'].text.strip()}")


def _complete_models(values: dict[str, Any], given: Mapping[str, Given]) -> None:
    if "load_workflows" in values and given["load_workflows"].text.strip().lower() == "all":
        values["load_workflows"] = tuple((None, name) for name in startup_workflows(values["workflow_store"]))
    if "load_models" not in values:
        return
    values["initial_models"] = given["load_models"].text.strip()
    if values["initial_models"].lower() == "all":
        values["load_models"] = tuple((None, name) for name in startup_archives(values["model_store"]))


def _complete_web_workers(values: dict[str, Any], warnings: list[str]) -> None:
    """A file tuned for TorchServe says how many threads accept; here processes do."""
    threads = values.get("number_of_netty_threads", 0)
    if threads == 0 or "web_workers" in values:
        return
    values["web_workers"] = min(threads, 2 * usable_cores())
    warnings.append(
        f"number_of_netty_threads={threads} taken as web_workers={values['web_workers']} (at most two a core)"
    )


def _without_effect(given: Mapping[str, Given]) -> list[str]:
    """One warning for the keys that nothing here could obey."""
    known = property_settings()
    none = [key for key in given if not known[key].has_effect and not _names_log_config(key, given[key])]
    return [f"no effect in this server, can be removed: {', '.join(none)}"] if none else []


def _unknown_model_settings(values: Mapping[str, Any], given: Mapping[str, Given]) -> list[str]:
    """One warning for each setting in the key `models` that nobody reads."""
    return [
        f"{given['models'].where}: model {name!r}, version {version!r}: unknown setting {key!r} is ignored"
        f"{nearest(key, ENTRY_KEYS)}"
        for name, version, key in unknown_settings(values.get("models", {}))
    ]


def _names_log_config(key: str, source: Given) -> bool:
    return key == "vmargs" and "configurationFile=" in source.text


def _log_config_of_vmargs(values: Mapping[str, Any], given: Mapping[str, Given]) -> Path | None:
    """The log configuration that Java arguments name; `--log-config` goes before it."""
    if "vmargs" not in values or not _names_log_config("vmargs", given["vmargs"]):
        return None
    from wsgi_ts.logs.user_config import log4j_file

    path = log4j_file(values["vmargs"])
    if path is not None and not path.is_file():
        raise ConfigError(f"{given['vmargs'].where}: log configuration not found: {path}")
    return None if path is None else _absolute(os.fspath(path))


def _check_log_config(config: Config, environ: Mapping[str, str]) -> None:
    """Reads the log configuration, so that a mistake in it is told where the server is started."""
    if config.log_config is None:
        return
    from wsgi_ts.logs.notation import LogConfigError
    from wsgi_ts.logs.user_config import load_plan

    try:
        load_plan(config.log_dir, config.metrics_dir, config.log_config, environ)
    except LogConfigError as error:
        raise ConfigError(str(error)) from None


def _check_addresses(config: Config, given: Mapping[str, Given]) -> None:
    """No two listeners on one address, except inference and management, which then share it."""
    seen: dict[Address, str] = {}
    keys = ["inference_address", "management_address"]
    if config.enable_metrics_api:
        keys.append("metrics_address")
    for key in keys:
        address: Address = getattr(config, key)
        where = given[key].where if key in given else key
        other = seen.setdefault(address, key)
        if key == "metrics_address" != other and (address.port != 0 or address.scheme == "unix"):
            raise ConfigError(
                f"{where}: Failed to bind to address: {address}: {other} is the same; give each its own port"
            )
