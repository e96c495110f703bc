"""The settings table: every key of config.properties with its type, default and meaning, in one dataclass.

The launcher reads file, environment and command line into a `Config` (`wsgi_ts.settings.sources`) and writes it
as JSON; every other process reads that JSON and nothing else. `Config()` holds all the defaults.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from wsgi_ts.logs.text import safe_text
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings import kinds
from wsgi_ts.settings.address import Address
from wsgi_ts.settings.kinds import BOOLEAN, PATH, TEXT, integer
from wsgi_ts.settings.model_entries import ENTRY_NUMBERS
from wsgi_ts.settings.table import Setting, launch_value, ours, setting, settings_of

#: TorchServe's default of `allowed_urls`.
DEFAULT_ALLOWED_URLS = ("file://.*", "http(s)?://.*")
BATCH_POLICIES = ("adaptive", "fixed", "none")
#: The key that an error found after reading is about: its first word, or one in parentheses.
_KEY_OF_ERROR = re.compile(r"^\w+|(?<=\()\w+(?=\))")


class ConfigError(Exception):
    """The configuration cannot be used; the message says where, what and what to do, on one line."""

    def __init__(self, message: str) -> None:
        # A value may be anything, line ends included.
        super().__init__(safe_text(message))


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one instance; field names are the keys of config.properties."""

    # Addresses and the protocols spoken there
    inference_address: Address = setting(
        kinds.address(80, 443), Address("http", "127.0.0.1", 8080), "where predictions are served"
    )
    management_address: Address = setting(
        kinds.address(8081, 8444), Address("http", "127.0.0.1", 8081), "where models are managed"
    )
    metrics_address: Address = setting(
        kinds.address(8082, 8445), Address("http", "127.0.0.1", 8082), "where Prometheus reads metrics"
    )
    enable_metrics_api: bool = setting(BOOLEAN, True, "open metrics_address")
    ts_open_inference_protocol: bool = setting(
        kinds.OIP, False, "serve the open inference protocol (KServe v2)", env_always=True
    )
    grpc_inference_address: str = setting(TEXT, "127.0.0.1", "IP of the inference gRPC server")
    grpc_management_address: str = setting(TEXT, "127.0.0.1", "IP of the management gRPC server")
    grpc_inference_port: int = setting(kinds.PORT, 7070, "port of the inference gRPC server")
    grpc_management_port: int = setting(kinds.PORT, 7071, "port of the management gRPC server")
    grpc_inference_max_connection_age_ms: int | None = setting(
        kinds.LONG, None, "life of an inference gRPC connection; unset: no end"
    )
    grpc_inference_max_connection_age_grace_ms: int | None = setting(
        kinds.LONG, None, "time for calls under way on a connection that is renewed"
    )
    grpc_management_max_connection_age_ms: int | None = setting(
        kinds.LONG, None, "life of a management gRPC connection; unset: no end"
    )
    grpc_management_max_connection_age_grace_ms: int | None = setting(
        kinds.LONG, None, "time for calls under way on a connection that is renewed"
    )
    enable_grpc_ssl: bool = setting(BOOLEAN, False, "TLS on both gRPC servers")
    max_request_size: int = setting(kinds.SIZE, 6553500, "largest request body; above: status 413")
    max_response_size: int = setting(kinds.SIZE, 6553500, "largest answer of a handler to one request")
    cors_allowed_origin: str = setting(kinds.HEADER_VALUE, "", "Access-Control-Allow-Origin of every answer")
    cors_allowed_methods: str = setting(kinds.HEADER_VALUE, "", "Access-Control-Allow-Methods of every answer")
    cors_allowed_headers: str = setting(kinds.HEADER_VALUE, "", "Access-Control-Allow-Headers of every answer")

    # TLS
    keystore: Path | None = setting(PATH, None, "PKCS12 key store with key and certificate")
    keystore_pass: str = setting(TEXT, "changeit", "password of the key store")
    keystore_type: str = setting(TEXT, "PKCS12", "type of the key store")
    private_key_file: Path | None = setting(PATH, None, "PEM private key")
    certificate_file: Path | None = setting(PATH, None, "PEM certificate chain")
    tls_security_level: int | None = ours(
        integer(0, 5),
        None,
        "OpenSSL's security level, 0 to 5; unset: OpenSSL's own, or the highest that takes the key; 1 allows 1024 bits",
    )
    client_ca_file: Path | None = setting(
        PATH,
        None,
        "PEM file of the authorities whose certificates TLS clients show; unset: none is asked for",
        ours=True,
    )
    client_certificate: str = setting(
        kinds.choice("required", "optional"),
        "required",
        "with client_ca_file: whether a client without a certificate is let in, for plugins to decide",
        ours=True,
    )

    # Threads and processes
    web_workers: int = ours(integer(1, 1024), 2, "gunicorn workers of the inference API")
    slots_per_worker: int = ours(
        integer(16, 65536), 1024, "requests that one web worker can have under way; one model leaves some to the others"
    )
    shm_warm_bytes: int = ours(integer(0, 2**40, "bytes"), 0, "shared memory kept for large bodies; 0: chosen")
    graceful_timeout: int = ours(integer(0, 86400, "s"), 30, "how long a stop waits for requests under way")
    drain_delay: int = ours(
        integer(0, 86400, "s"),
        0,
        "how long a stop goes on serving, while it says that it is not ready, until nobody sends any more",
    )
    direct_answers: bool = ours(
        BOOLEAN, True, "predictions without headers of their handler are answered without the Falcon app"
    )
    number_of_netty_threads: int = setting(integer(), 0, "taken as web_workers where that is not given")
    netty_client_threads: int = setting(integer(), 0, "threads towards the backend", has_effect=False)
    use_native_io: bool = setting(BOOLEAN, True, "epoll and Unix sockets", env=False, has_effect=False)
    io_ratio: int = setting(integer(1, 100), 50, "Netty's event loop ratio", env=False, has_effect=False)
    prefer_direct_buffer: bool = setting(BOOLEAN, False, "Java direct buffers", has_effect=False)

    # Models and model workers
    model_store: Path | None = setting(PATH, None, "directory of the model archives")
    load_models: tuple[tuple[str | None, str], ...] = setting(kinds.MODEL_LIST, (), "models loaded at startup")
    models: dict[str, Any] = setting(kinds.MODELS, {}, "defaults for named models and versions", env=False)
    model_snapshot: dict[str, Any] | None = setting(
        kinds.JSON_OBJECT, None, "recorded state to restore instead of load_models", env=False
    )
    workflow_store: Path | None = setting(PATH, None, "directory of the workflow archives; unset: model_store")
    load_workflows: tuple[tuple[str | None, str], ...] = ours(
        kinds.MODEL_LIST, (), "workflows loaded at startup, after the models"
    )
    workflow_registration: bool = ours(BOOLEAN, True, "whether workflows can be registered over the API")
    workflow_names: bool = ours(BOOLEAN, True, "workflows answer over gRPC and KServe where no model has their name")
    default_workers_per_model: int = setting(
        integer(), 0, "workers of a model that says nothing; 0: none, at startup one per GPU or core"
    )
    default_response_timeout: int = setting(integer(unit="s"), 120, "longest run of a handler for one batch")
    default_startup_timeout: int = setting(integer(unit="s"), 120, "longest loading of a model")
    unregister_model_timeout: int = setting(integer(unit="s"), 120, "wait for the workers of a removed model")
    job_queue_size: int = setting(integer(1), 100, "requests waiting for one model; above: status 503")
    number_of_gpu: int | None = setting(integer(), None, "use at most this many GPUs; unset: all")
    batch_policy: str = ours(kinds.choice(*BATCH_POLICIES), "adaptive", "when a batch that is not full goes")
    default_service_handler: str | None = setting(TEXT, None, "handler of archives that name none")
    service_envelope: str | None = setting(
        kinds.choice("body", "json", "kserve", "kservev2", or_default=True),
        None,
        "request envelope of models whose archive names none",
    )
    install_py_dep_per_model: bool = setting(BOOLEAN, False, "install an archive's requirements file at registration")
    allowed_urls: tuple[str, ...] = setting(
        kinds.URL_PATTERNS, DEFAULT_ALLOWED_URLS, "URLs that may be registered (the whole URL must match)", env=False
    )
    use_env_allowed_urls: bool = setting(BOOLEAN, False, "take allowed_urls from TS_ALLOWED_URLS", env=False)
    blacklist_env_vars: str = setting(kinds.REGEX, "", "variables kept from model workers (whole name matches)")
    limit_max_image_pixels: bool = setting(BOOLEAN, True, "keep Pillow's limit against huge images")
    decode_input_request: bool = setting(BOOLEAN, True, "give handlers text and JSON decoded")
    torch_load_weights_only: bool = ours(BOOLEAN, True, "the built-in handlers load weights, never pickled code")
    initial_worker_port: int = setting(integer(0, 10**9), 9000, "id of the first model worker")
    initial_distribution_port: int = setting(kinds.PORT, 29500, "id of the first model worker that spans several GPUs")
    python: str = setting(TEXT, sys.executable or "python3", "interpreter of the model workers")
    preload_modules: tuple[str, ...] = ours(
        kinds.MODULES,
        ("torch",),
        "imported once, before model workers are forked, so that each of them has them; empty: none",
    )
    cpu_launcher_enable: bool = setting(BOOLEAN, False, "start workers under torch.backends.xeon", has_effect=False)
    cpu_launcher_args: str = setting(TEXT, "", "arguments of that launcher", has_effect=False)
    ipex_enable: bool = setting(BOOLEAN, False, "told to handlers as TS_IPEX_ENABLE")
    ipex_gpu_enable: bool = setting(BOOLEAN, False, "told to handlers as TS_IPEX_GPU_ENABLE")
    reload: bool = ours(
        BOOLEAN, False, "replace a model's workers when its archive or its folder changes, without losing a request"
    )
    console: bool = ours(BOOLEAN, True, "serve the console (/console of the management API), and /docs of both APIs")
    debug: bool = setting(BOOLEAN, False, "one worker per startup model, and no time-outs for model workers")
    ts_header_key_sequence_id: str = setting(kinds.HEADER_NAME, "ts_request_sequence_id", "header: sequence id")
    ts_header_key_sequence_start: str = setting(
        kinds.HEADER_NAME, "ts_request_sequence_start", "header: first request of a sequence"
    )
    ts_header_key_sequence_end: str = setting(
        kinds.HEADER_NAME, "ts_request_sequence_end", "header: last request of a sequence"
    )

    # Who may do what
    enable_model_api: bool = setting(BOOLEAN, False, "allow POST /models and DELETE /models/…")
    disable_token_authorization: bool | None = setting(
        BOOLEAN,
        None,
        "answer without a token; unset: true where every API is bound to this machine only, "
        "unless `enable_model_api=true` or `token_expiration_min` is given",
    )
    token_expiration_min: float = setting(
        kinds.NUMBER, 60.0, "minutes that a token lasts", env="TS_TOKEN_EXPIRATION_TIME_MIN"
    )

    # Metrics and logs
    metrics_mode: str = setting(kinds.choice("log", "prometheus", "legacy", or_default=True), "log", "where metrics go")
    metrics_config: Path | None = setting(PATH, None, "metrics.yaml; unset: the built-in one")
    model_metrics_auto_detect: bool = setting(BOOLEAN, False, "accept metrics that metrics.yaml lacks")
    vllm_metric_names: bool = ours(
        BOOLEAN, False, "/metrics also shows queue, running requests and KV cache use under vLLM's names"
    )
    endpoint_load_metrics: bool = ours(
        BOOLEAN, False, "predictions' answers tell the server's load, for proxies (ORCA)"
    )
    disable_system_metrics: bool = setting(BOOLEAN, False, "no CPU, memory, disk and GPU metrics")
    system_metrics_cmd: str = setting(TEXT, "", "program that prints the system metrics", env=False)
    metric_time_interval: int = setting(integer(1, unit="s"), 60, "period of the system metrics", env=False)
    async_logging: bool = setting(BOOLEAN, False, "log lines are written by a thread of their own")
    log_format: str = ours(
        kinds.choice("text", "json"),
        "text",
        "json: access_log.log has one JSON object for each request, with its times",
    )

    # Traces
    trace_keep: int = ours(
        integer(0, 1000),
        10,
        "so many of a model's slowest requests in a minute, and failed ones, are kept for `wsgi-ts explain`; 0: none",
    )
    trace_slow_ms: int = ours(integer(0, unit="ms"), 0, "what takes longer is kept in any case; 0: no such limit")
    server_timing: bool = ours(
        BOOLEAN, False, "predictions' answers tell in the header Server-Timing where their time went"
    )
    otlp_endpoint: str = ours(
        TEXT, "", "URL of an OpenTelemetry collector (OTLP over HTTP) that spans are sent to; empty: none"
    )
    trace_sample_ratio: float = ours(
        kinds.RATIO,
        1.0,
        "share of the requests without a trace of their client that get spans; others go by their traceparent",
    )

    # Plugins
    plugins_path: str = setting(TEXT, "", "folders with plugins, separated by colons")
    plugin: tuple[str, ...] = ours(kinds.OBJECTS, (), "plugins by their Python names")
    plugins: tuple[str, ...] = ours(
        kinds.NAMES,
        (),
        "load only these of the plugins that are installed or in plugins_path; unset: all in plugins_path, and those "
        "installed that open nothing to the network",
    )
    plugins_strict: bool = ours(BOOLEAN, False, "do not start where a plugin cannot be loaded")
    middleware: tuple[str, ...] = ours(kinds.OBJECTS, (), "WSGI middleware around the apps, the outermost first")
    middleware_all: bool = ours(BOOLEAN, False, "predictions pass the middleware, too; then no answer is direct")
    gunicorn_config: Path | None = ours(PATH, None, "Python file with hooks of gunicorn")

    # The launcher's own
    enable_envvars_config: bool = setting(BOOLEAN, False, "let TS_… variables set keys", env=False)
    model_server_home: Path | None = setting(PATH, None, "where the server is installed", env_always=True)
    cpp_log_config: Path | None = setting(PATH, None, "log configuration of the C++ backend", has_effect=False)
    vmargs: str = setting(
        TEXT, "", "arguments of the Java machine; the log configuration they name is read", has_effect=False
    )

    # Not keys: filled in by the launcher
    config_file: Path | None = launch_value(PATH, None, "the file that was read; none: defaults")
    initial_models: str = launch_value(TEXT, "", "load_models as the user wrote it")
    no_config_snapshots: bool = launch_value(BOOLEAN, False, "--no-config-snapshots was given")
    log_config: Path | None = launch_value(PATH, None, "--log-config, or the file that vmargs name")
    log_dir: Path = launch_value(PATH, Path("logs"), "LOG_LOCATION, or logs in the current directory")
    metrics_dir: Path = launch_value(PATH, Path("logs"), "METRICS_LOCATION, or logs in the current directory")
    temp_dir: Path = launch_value(PATH, Path("/tmp"), "TEMP, or the system's directory for temporary files")
    run_dir: Path = launch_value(PATH, Path("/tmp/wsgi-ts"), "what belongs to the running instance")
    embedded_in: int | None = launch_value(
        integer(),
        None,
        "the process that the server is an engine of: it opens no addresses, and ends with that process",
    )
    warnings: tuple[str, ...] = launch_value(kinds.LINES, (), "what the launcher has warned of already")
    found_plugins: tuple[dict[str, Any], ...] = launch_value(kinds.ROWS, (), "the plugins that are loaded")
    origins: dict[str, str] = launch_value(kinds.JSON_OBJECT, {}, "file and line of each key that was given")

    @property
    def is_combined(self) -> bool:
        """Whether inference and management share one listener."""
        return self.inference_address == self.management_address

    @property
    def token_authorization(self) -> bool:
        """Whether requests need a token: as `disable_token_authorization` says.

        Unset, they do if others can reach an API, or where a configuration can only be meant for a TorchServe that asks
        for tokens by default: it says how long they last, or allows the model API, whose switch came with that default.
        """
        if self.disable_token_authorization is not None:
            return not self.disable_token_authorization
        if self.auth_plugins:
            return False
        if "token_expiration_min" in self.origins or self.enable_model_api:
            return True
        everywhere = [*self.addresses.values(), *self.grpc_addresses.values()]
        return not all(address.is_local for address in everywhere)

    @property
    def auth_plugins(self) -> bool:
        """Whether plugins say who may ask; tokens are off then, unless the configuration wants both."""
        return any(row["group"] == "auth" for row in self.found_plugins)

    @property
    def serves_kserve(self) -> bool:
        """Whether clients of KServe's are expected: its requests are unwrapped, or its second protocol is spoken."""
        return self.ts_open_inference_protocol or self.service_envelope in ("kserve", "kservev2")

    @property
    def serves_tls(self) -> bool:
        """Whether any API is served over TLS."""
        return any(address.is_tls for address in (*self.addresses.values(), *self.grpc_addresses.values()))

    @property
    def addresses(self) -> dict[str, Address]:
        """The address of every REST API that is served, by the API's name."""
        if self.embedded_in is not None:
            return {}
        found = {"inference": self.inference_address, "management": self.management_address}
        return {**found, "metrics": self.metrics_address} if self.enable_metrics_api else found

    @property
    def grpc_addresses(self) -> dict[str, Address]:
        """The address of both gRPC APIs, by the API's name; none where no API is served."""
        if self.embedded_in is not None:
            return {}
        scheme = "grpcs" if self.enable_grpc_ssl else "grpc"
        return {
            "inference": Address(scheme, self.grpc_inference_address.strip("[]"), self.grpc_inference_port),
            "management": Address(scheme, self.grpc_management_address.strip("[]"), self.grpc_management_port),
        }

    @property
    def keeps_traces(self) -> bool:
        """Whether records of slow and failed requests are kept."""
        return bool(self.trace_keep or self.trace_slow_ms)

    @property
    def fixed(self) -> dict[str, str]:
        """What an upgrade of a running server cannot change, for people: the sockets stay, and the keys."""
        places = {f"{kind}_address": str(address) for kind, address in self.addresses.items()}
        places |= {f"grpc_{kind}_port": str(address) for kind, address in self.grpc_addresses.items()}
        return {**places, "token authorization": str(self.token_authorization).lower()}

    def model_defaults(self, name: str, version: str) -> dict[str, int]:
        """The numbers that the `models` key gives this version, by their keys there; those up to 0 count as unset."""
        entry = self.models.get(name, {}).get(version, {})
        return {key: entry[key] for key in ENTRY_NUMBERS if entry.get(key, 0) > 0}

    def located(self, message: str) -> str:
        """An error message found after reading, with file and line of the key it begins with, or has in parentheses."""
        for key in _KEY_OF_ERROR.findall(message):
            if key in self.origins:
                return f"{self.origins[key]}: {message}"
        return message

    def to_json(self) -> str:
        """The whole configuration as one JSON object, for the processes of the instance."""
        values = {name: (row.kind, getattr(self, name)) for name, row in settings_of(Config).items()}
        rows = {name: None if value is None else kind.encode(value) for name, (kind, value) in values.items()}
        return json.dumps(rows, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Reads what `to_json` wrote; what is left out has its default. Raises ConfigError for anything else."""
        try:
            rows = json.loads(text)
            if not isinstance(rows, dict):
                raise ValueError("not a JSON object")
            known = settings_of(cls)
            decoded: dict[str, Any] = {
                name: None if value is None else known[name].kind.decode(value) for name, value in rows.items()
            }
            return cls(**decoded)
        except KeyError as error:
            raise ConfigError(f"configuration: unknown key {error}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"configuration: {error}") from error


def property_settings() -> dict[str, Setting]:
    """The keys of config.properties, in order."""
    return {name: row for name, row in settings_of(Config).items() if row.is_key}
