"""The settings table, config.properties with all its sources, and model-config.yaml."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsgi_ts.instance.shared_memory import segment_layout, start_bytes
from wsgi_ts.models.arguments import RegisterArguments
from wsgi_ts.models.effective_settings import effective_settings
from wsgi_ts.models.model_yaml import ModelYaml, check_parallel, parse_model_yaml
from wsgi_ts.settings.address import Address, parse_address
from wsgi_ts.settings.config import Config, ConfigError, property_settings
from wsgi_ts.settings.properties import PropertiesError, parse_properties, substitute_variables
from wsgi_ts.settings.sources import CommandLine, load_config
from wsgi_ts.settings.table import settings_of


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a model store."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    return tmp_path


def load(
    content: str | bytes = "", environ: dict[str, str] | None = None, *, store: bool = True, **flags: Any
) -> Config:
    """Loads a config.properties of this content in the current directory."""
    data = content.encode() if isinstance(content, str) else content
    if store:
        data += b"\nmodel_store=store\n"
    Path("config.properties").write_bytes(data)
    return load_config(CommandLine(**flags), environ or {})


def failure(content: str | bytes = "", environ: dict[str, str] | None = None, **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(content, environ, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Java properties ---


def pairs(text: str | bytes) -> list[tuple[str, str]]:
    data = text.encode() if isinstance(text, str) else text
    return [(entry.key, entry.value) for entry in parse_properties(data)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=b", [("a", "b")]),
        ("  a \t=\f  b c  ", [("a", "b c  ")]),
        ("a:b\nc d\ne", [("a", "b"), ("c", "d"), ("e", "")]),
        ("a = = b", [("a", "= b")]),
        ("# x=1\n! y=2\n\n \t\n z=3", [("z", "3")]),
        ("a=1\\\n   2\\\n\t3\nb=4", [("a", "123"), ("b", "4")]),
        ("a=1\\\\\nb=2", [("a", "1\\"), ("b", "2")]),
        ("# comment \\\nb=2", [("b", "2")]),
        ("a=1\\\n# no comment", [("a", "1# no comment")]),
        ("a=end\\", [("a", "end")]),
        ("a\\ b\\=\\:=c\\:\\=", [("a b=:", "c:=")]),
        ("a=\\t\\n\\r\\f\\q\\u00e9\\u20AC", [("a", "\t\n\r\fqé€")]),
        ("a=\\uD83D\\uDE00", [("a", "\U0001f600")]),
        ("\ufeffa=b\r\nc=d\re=f", [("a", "b"), ("c", "d"), ("e", "f")]),
        ("a=1\\\r\n  2\r\n", [("a", "12")]),
        ("=x", [("", "x")]),
        ("unter=größe", [("unter", "größe")]),
        ("", []),
    ],
)
def test_properties_syntax(text: str, expected: list[tuple[str, str]]) -> None:
    assert pairs(text) == expected


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"a=1\nb=2\nc=\0", 3, "NUL byte"),
        (b"a=1\nb=\\u12", 2, "malformed"),
        (b"a=\\uD83Dx", 1, "surrogate"),
    ],
)
def test_properties_errors_name_the_line(data: bytes, line: int, reason: str) -> None:
    with pytest.raises(PropertiesError, match=reason) as caught:
        parse_properties(data)
    assert caught.value.line == line


def test_latin_1_where_it_is_not_utf8() -> None:
    assert [entry.value for entry in parse_properties("# für\na=größe".encode("latin-1"))] == ["größe"]


def test_properties_line_is_where_the_key_begins() -> None:
    assert [entry.line for entry in parse_properties(b"# c\na=1\\\n2\\\n3\nb=4\r\n\r\nc=5")] == [2, 5, 7]


def java_escape(text: str, *, key: bool) -> str:
    """As java.util.Properties.store writes it."""
    out = []
    for index, char in enumerate(text):
        if char in "\t\n\r\f":
            out.append({"\t": "\\t", "\n": "\\n", "\r": "\\r", "\f": "\\f"}[char])
        elif char in "\\=:#!" or (char == " " and (key or index == 0)):
            out.append("\\" + char)
        elif " " <= char <= "~":
            out.append(char)
        else:
            units = char.encode("utf-16-be")
            out += [f"\\u{units[i : i + 2].hex().upper()}" for i in range(0, len(units), 2)]
    return "".join(out)


@given(st.lists(st.tuples(st.text(min_size=1), st.text())))
def test_properties_read_back_what_java_writes(entries: list[tuple[str, str]]) -> None:
    text = "".join(f"{java_escape(k, key=True)}={java_escape(v, key=False)}\n" for k, v in entries)
    assert pairs(text) == entries


@given(st.binary())
def test_properties_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_properties(data)
    except PropertiesError as error:
        assert 1 <= error.line <= data.count(b"\n") + data.count(b"\r") + 1


def test_properties_long_lines() -> None:
    assert pairs("a=" + "x" * 2**20) == [("a", "x" * 2**20)]
    assert pairs("\\" * 2**20 + "=1") == [("\\" * 2**19, "1")]
    assert pairs("k" * 2**20) == [("k" * 2**20, "")]


def test_substitution() -> None:
    assert substitute_variables("a$$X$$b$$X$$", {"X": "1"}) == "a1b1"
    assert substitute_variables("$X $$", {}) == "$X $$"
    with pytest.raises(ValueError, match="Invalid Environment Variable NOPE"):
        substitute_variables("$$NOPE$$", {})


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:8080", Address("http", "127.0.0.1", 8080)),
        ("HTTPS://Example.org:1", Address("https", "Example.org", 1)),
        ("http://h", Address("http", "h", 80)),
        ("https://h", Address("https", "h", 443)),
        ("http://h:65534", Address("http", "h", 65534)),
        ("http://[::1]:80", Address("http", "::1", 80)),
        ("unix:/tmp/a b.sock", Address("unix", path="/tmp/a b.sock")),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize("text", ["http://h:65535", "http://h:99999999999999999999"])
def test_ports_too_large(text: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid port number: {text}"):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:8080",
        "ftp://h",
        "http://",
        "http://h:",
        "http://h:x",
        "http://h:1/",
        "unix:rel",
        "http://a b",
    ],
)
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid binding address: "):
        parse_address(text)


# --- the table ---


def test_every_setting_survives_json() -> None:
    assert Config.from_json(Config().to_json()) == Config()


def test_json_of_all_kinds(place: Path) -> None:
    config = load(
        'inference_address=unix:/tmp/i.sock\nnumber_of_gpu=1\nmodels={"m": {"1.0": {"minWorkers": 2}}}\n'
        "load_models=a.mar,b=c.mar\nallowed_urls=file://.*,https://x/.*\ntoken_expiration_min=0.25\nio_ratio=3\n"
    )
    assert Config.from_json(config.to_json()) == config
    assert config.load_models == ((None, "a.mar"), ("b", "c.mar"))
    assert config.allowed_urls == ("file://.*", "https://x/.*")
    assert config.token_expiration_min == 0.25


@pytest.mark.parametrize("text", ["", "[]", '{"nope": 1}', '{"inference_address": "x"}'])
def test_json_that_is_no_configuration(text: str) -> None:
    with pytest.raises(ConfigError, match="configuration: "):
        Config.from_json(text)


def test_defaults_are_torchserve_s() -> None:
    config = Config()
    assert str(config.inference_address) == "http://127.0.0.1:8080"
    assert str(config.management_address) == "http://127.0.0.1:8081"
    assert str(config.metrics_address) == "http://127.0.0.1:8082"
    assert (config.grpc_inference_port, config.grpc_management_port) == (7070, 7071)
    assert (config.max_request_size, config.max_response_size) == (6553500, 6553500)
    assert (config.default_response_timeout, config.default_startup_timeout) == (120, 120)
    assert (config.job_queue_size, config.default_workers_per_model) == (100, 0)
    assert not config.enable_model_api
    assert not config.disable_token_authorization
    assert config.allowed_urls == ("file://.*", "http(s)?://.*")
    assert config.decode_input_request and config.limit_max_image_pixels and config.enable_metrics_api


def test_every_key_has_help_and_default_of_its_kind() -> None:
    config = Config()
    for name, row in settings_of(Config).items():
        assert row.default == getattr(config, name)
        assert row.help and not row.help.endswith("."), name
        encoded = json.loads(config.to_json())[name]
        if encoded is not None:
            assert row.kind.decode(encoded) == getattr(config, name)


def test_environment_names() -> None:
    rows = property_settings()
    names = {name: row.variable(name) for name, row in rows.items()}
    assert names["job_queue_size"] == "TS_JOB_QUEUE_SIZE"
    assert names["token_expiration_min"] == "TS_TOKEN_EXPIRATION_TIME_MIN"
    assert names["ts_open_inference_protocol"] == "TS_OPEN_INFERENCE_PROTOCOL"
    assert names["ts_header_key_sequence_id"] == "TS_HEADER_KEY_SEQUENCE_ID"
    for key in (
        "use_native_io",
        "io_ratio",
        "metric_time_interval",
        "enable_envvars_config",
        "model_snapshot",
    ):
        assert names[key] is None
    for key in ("models", "system_metrics_cmd", "use_env_allowed_urls", "allowed_urls"):
        assert names[key] is None


def test_shared_memory_counts_slots_as_they_are_made() -> None:
    """1025 slots are made as 2048: the doctor and the start once disagreed by a third."""
    at_1025, at_2048 = (start_bytes(dataclasses.replace(Config(), slots_per_worker=slots), 1) for slots in (1025, 2048))
    assert at_1025 == at_2048
    segment = segment_layout(dataclasses.replace(Config(), slots_per_worker=1025), 1)
    assert (segment.slots, segment.reserved_bytes % 4096) == (2048, 0)
    assert at_1025 > 3 * segment.reserved_bytes > 3 * 2048 * 4096


def test_shared_memory_fits_docker_by_default() -> None:
    assert start_bytes(Config(), 1) < 64 * 2**20
    assert start_bytes(dataclasses.replace(Config(), web_workers=200), 1) > 64 * 2**20


# --- reading a file ---


def test_docker_s_own_file(place: Path) -> None:
    config = load(
        "inference_address=http://0.0.0.0:8080\nmanagement_address=http://0.0.0.0:8081\n"
        "metrics_address=http://0.0.0.0:8082\ndefault_workers_per_model=32\njob_queue_size=1000\n"
        "workflow_store=store\n"
    )
    assert config.default_workers_per_model == 32
    assert config.model_store == place / "store" == config.workflow_store
    assert config.config_file == place / "config.properties"
    assert config.warnings == ()
    assert config.log_dir == config.metrics_dir == place / "logs"


def test_without_port_each_address_has_its_own(place: Path) -> None:
    config = load("inference_address=http://h\nmanagement_address=http://h\nmetrics_address=http://h")
    ports = [config.inference_address.port, config.management_address.port, config.metrics_address.port]
    assert ports == [80, 8081, 8082]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_request_size=abc", "config.properties:2: key max_request_size: 'abc' is not a whole number"),
        ("max_request_size=1.5", "config.properties:2: key max_request_size: '1.5' is not a whole number"),
        ("job_queue_size=0", "config.properties:2: key job_queue_size: 0 is not between 1 and 2147483647"),
        ("job_queue_size=9999999999", "is not between 1 and 2147483647"),
        ("job_queue_size=" + "9" * 5000, "is not a whole number"),
        ("max_request_size=3.0", "config.properties:2: key max_request_size: '3.0' is not a whole number"),
        ("max_request_size=0x10", "'0x10' is not a whole number"),
        ("max_request_size=1_000", "'1_000' is not a whole number"),
        ("max_request_size=1 000", "'1 000' is not a whole number"),
        ("grpc_inference_port=70000", "key grpc_inference_port: 70000 is not between 0 and 65534"),
        ("token_expiration_min=0", "key token_expiration_min: 0 is not a number above 0"),
        ("cors_allowed_origin=a\\nSet-Cookie: b", "cannot be the value of a header"),
        ("cors_allowed_origin=\u20ac", "cannot be the value of a header"),
        ("tls_security_level=6", "key tls_security_level: 6 is not between 0 and 5"),
        ("inference_address=127.0.0.1:8080", "Invalid binding address: 127.0.0.1:8080"),
        ("inference_address=0\\n0", "config.properties:2: key inference_address: Invalid binding address: 0\\n0"),
        ("inference_address=http://127.0.0.1:70000", "Invalid port number: http://127.0.0.1:70000"),
        ("models={", "key models: not valid JSON"),
        ("models=[1]", "key models: not a JSON object"),
        ('models={"m": 1}', "model 'm': not an object of versions"),
        ('models={"m": {"1.0": 1}}', "model 'm', version '1.0': not an object of settings"),
        ("blacklist_env_vars=(", "is not a regular expression"),
        ("allowed_urls=file://.*,*", "is not a regular expression"),
        ("preload_modules=torchvision, my-module", "'my-module' is not the name of a Python module"),
        ("batch_policy=quick", "'quick' is none of: adaptive, fixed, none"),
        ("load_models=a=", "'a=' is not of the form name=archive"),
        ("cors_allowed_origin=$$NOPE$$", "key cors_allowed_origin: Invalid Environment Variable NOPE"),
        ("workflow_store=nowhere", "config.properties:2: key workflow_store: directory not found: nowhere"),
        ("metrics_address=http://127.0.0.1:8081", "management_address is the same"),
        ("metrics_address=http://127.0.0.1:8080", "inference_address is the same"),
    ],
)
def test_bad_values(place: Path, line: str, message: str) -> None:
    assert message in failure("# comment\n" + line)


@pytest.mark.parametrize(
    ("text", "value", "warned"),
    [
        ("true", True, False),
        ("TRUE", True, False),
        ("True", True, False),
        ("false", False, False),
        ("FALSE", False, False),
        ("false ", False, False),
        # Not true to Java's Boolean.parseBoolean, and so false:
        ("true ", False, True),
        ("2", False, True),
        ("1", False, True),
        ("yes", False, True),
        ("ture", False, True),
    ],
)
def test_booleans_are_java_s(place: Path, text: str, value: bool, warned: bool) -> None:
    """Keys whose default is true and whose default is false; from the file and from the environment."""
    for key in ("async_logging", "decode_input_request", "disable_token_authorization"):
        expected = f"{text!r} is neither true nor false; taken for false, as in TorchServe"
        config = load(f"# comment\n{key}={text}")
        assert getattr(config, key) is value
        assert config.warnings == ((f"config.properties:2: key {key}: {expected}",) if warned else ())
        config = load("enable_envvars_config=true", {f"TS_{key.upper()}": text})
        assert getattr(config, key) is value
        said = (f"environment variable TS_{key.upper()}: {expected}",) if warned else ()
        assert config.warnings == said


def test_the_switch_for_the_environment_is_java_s_too(place: Path) -> None:
    variable = {"TS_JOB_QUEUE_SIZE": "7", "TS_ALLOWED_URLS": "file://x"}
    assert load("enable_envvars_config=True", variable).job_queue_size == 7
    for text in ("1", "true "):
        config = load(f"enable_envvars_config={text}\nuse_env_allowed_urls={text}", variable)
        assert (config.job_queue_size, config.allowed_urls) == (100, Config().allowed_urls)
        assert [warning.split(":")[1] for warning in config.warnings] == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "key", "value", "warning"),
    [
        (
            "service_envelope=kfserving",
            "service_envelope",
            None,
            "'kfserving' is none of: body, json, kserve, kservev2; taken as not given",
        ),
        ("token_expiration_min=so", "token_expiration_min", 60.0, "'so' is not a number; the default is used: 60.0"),
        ("token_expiration_min=1_0", "token_expiration_min", 60.0, "'1_0' is not a number; the default is used: 60.0"),
        ("ts_open_inference_protocol=kserve", "ts_open_inference_protocol", False, "taken for false, as in TorchServe"),
        (
            "ts_header_key_sequence_id=größe\u20ac",
            "ts_header_key_sequence_id",
            "ts_request_sequence_id",
            "cannot be the name of a header; the default is used: ts_request_sequence_id",
        ),
        ("decode_input_request=", "decode_input_request", False, "taken for false, as in TorchServe"),
        ("disable_token_authorization=", "disable_token_authorization", None, "is empty and taken as not given"),
        ("job_queue_size=", "job_queue_size", 100, "is empty and taken as not given"),
        ("inference_address= ", "inference_address", Config().inference_address, "is empty and taken as not given"),
    ],
)
def test_values_with_which_torchserve_starts_are_warned_of(
    place: Path, line: str, key: str, value: Any, warning: str
) -> None:
    config = load(f"# comment\n{line}")
    assert getattr(config, key) == value
    assert len(config.warnings) == 1
    assert config.warnings[0].startswith(f"config.properties:2: key {key}: ")
    assert config.warnings[0].endswith(warning)


def test_deeply_nested_json_is_refused(place: Path) -> None:
    assert "not valid JSON" in failure("models=" + '{"a":' * 100000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a=b".encode("utf-16"), "config.properties:1: there is a NUL byte"),
        (b"\n\n\0", "config.properties:3: there is a NUL byte"),
        (b"x=" + b"y" * (17 * 2**20), "larger than"),
    ],
)
def test_files_that_are_no_text(place: Path, data: bytes, message: str) -> None:
    assert message in failure(data)


def test_bom_crlf_and_blanks_at_the_end(place: Path) -> None:
    config = load("\ufeffjob_queue_size=7  \r\nmodel_store=store \r\n".encode(), store=False)
    assert config.job_queue_size == 7
    assert config.model_store == place / "store"


def test_empty_values_count_as_not_given(place: Path) -> None:
    config = load("job_queue_size=\ndefault_service_handler=\nload_models=\ncors_allowed_origin=")
    assert config == dataclasses.replace(load(""), warnings=config.warnings, origins=config.origins)
    assert config.warnings == ("config.properties:1: key job_queue_size: is empty and taken as not given",)


def test_no_module_at_all_is_imported_beforehand(place: Path) -> None:
    assert load("").preload_modules == ("torch",)
    config = load("preload_modules=")
    assert config.preload_modules == ()
    assert config.warnings == ()


def test_unknown_keys_are_warned_of(place: Path) -> None:
    config = load("max_reqest_size=5\nzzz=1\nversion=0.12.0\ntsConfigFile=x\n")
    assert config.warnings == (
        "config.properties:1: unknown key 'max_reqest_size' is ignored; did you mean max_request_size?",
        "config.properties:2: unknown key 'zzz' is ignored",
    )


def test_a_key_given_twice(place: Path) -> None:
    config = load("job_queue_size=1\njob_queue_size=2")
    assert config.job_queue_size == 2
    assert config.warnings == (
        "config.properties:2: key job_queue_size is given again; this line counts, the one before does not",
    )


def test_keys_without_effect_parse_and_are_warned_of_once(place: Path) -> None:
    config = load("io_ratio=10\nprefer_direct_buffer=true\nvmargs=-Xmx4g")
    assert config.io_ratio == 10
    assert config.warnings == ("no effect in this server, can be removed: io_ratio, prefer_direct_buffer, vmargs",)


def test_netty_threads_become_web_workers(place: Path) -> None:
    config = load("number_of_netty_threads=1000")
    assert config.web_workers == 2 * (os.cpu_count() or 1)
    assert len(config.warnings) == 1
    assert load("number_of_netty_threads=1").web_workers == 1
    assert load("number_of_netty_threads=1000\nweb_workers=3").web_workers == 3
    assert load("number_of_netty_threads=0").web_workers == 2


def test_metrics_mode(place: Path) -> None:
    assert load("metrics_mode= Prometheus ").metrics_mode == "prometheus"
    config = load("metrics_mode=loud")
    assert config.metrics_mode == "log"
    assert "'loud' is none of: log, prometheus, legacy; the default is used" in config.warnings[0]


def test_equal_addresses(place: Path) -> None:
    assert load("management_address=http://127.0.0.1:8080").is_combined
    assert load("metrics_address=http://127.0.0.1:8081\nenable_metrics_api=false").metrics_address.port == 8081
    same = "metrics_address=http://h:0\nmanagement_address=http://h:0"
    assert load(same).metrics_address.port == 0
    assert "is the same" in failure("metrics_address=unix:/tmp/s\nmanagement_address=unix:/tmp/s")


def test_model_defaults(place: Path) -> None:
    config = load(
        'models={\\\n  "noop": {\\\n  "1.0": {"defaultVersion": true, "minWorkers": 1, "batchSize": 4,\\\n'
        '  "maxBatchDelay": 0, "responseTimeout": -1, "maxWorkers": null, "startupTimeout": "5"}}}'
    )
    defaults = config.model_defaults("noop", "1.0")
    assert defaults == {"minWorkers": 1, "batchSize": 4, "startupTimeout": 5}
    assert config.model_defaults("noop", "2.0") == config.model_defaults("x", "1.0")


def test_errors_that_are_found_later_have_the_line_too(place: Path) -> None:
    text = "# comment\nkeystore=a.p12\nenable_envvars_config=true\ninference_address=http://127.0.0.1:1\n"
    config = load(text, {"TS_PYTHON": "python2"}, plugins_path="p")
    assert config.located("keystore /a.p12: is old") == "config.properties:2: keystore /a.p12: is old"
    bind = "Failed to bind to address: http://127.0.0.1:1 (inference_address): in use"
    assert config.located(bind) == f"config.properties:4: {bind}"
    assert config.located("python=python2: no") == "environment variable TS_PYTHON: python=python2: no"
    assert config.located("plugins_path: no") == "--plugins-path: plugins_path: no"
    for message in ("job_queue_size: was not given", "/dev/shm (keystore x): full", "run directory: keystore"):
        assert config.located(message) == message
    assert Config.from_json(config.to_json()).located("keystore x") == "config.properties:2: keystore x"


# --- which file, and who wins ---


def test_search_order(place: Path) -> None:
    for name, size in (("env.cfg", 1), ("flag.cfg", 2), ("logs/config/20240101000000000-startup.cfg", 3)):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"model_store=store\njob_queue_size={size}\n")
    (place / "logs/config/20230101000000000-shutdown.cfg").write_text("job_queue_size=x")
    (place / "logs/config/notes.cfg").write_text("job_queue_size=x")
    assert load("job_queue_size=4", {"TS_CONFIG_FILE": "env.cfg"}, ts_config="flag.cfg").job_queue_size == 1
    assert load("job_queue_size=4", ts_config="flag.cfg").job_queue_size == 2
    assert load("job_queue_size=4").job_queue_size == 3
    assert load("job_queue_size=4", {"LOG_LOCATION": "elsewhere"}).job_queue_size == 4
    assert load("job_queue_size=4", no_config_snapshots=True).job_queue_size == 4
    (place / "config.properties").unlink()
    config = load_config(CommandLine(model_store="store", no_config_snapshots=True), {})
    assert (config.job_queue_size, config.config_file) == (100, None)


def test_snapshot_values(place: Path) -> None:
    snapshot = '{\\n  "name"\\: "x.cfg",\\n  "modelCount"\\: 0\\n}'
    assert load(f"model_snapshot={snapshot}").model_snapshot == {"name": "x.cfg", "modelCount": 0}


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"ts_config": "no.cfg"}, {}, "--ts-config file not found: no.cfg"),
        ({}, {"TS_CONFIG_FILE": "no.cfg"}, "--ts-config file not found: no.cfg"),
        ({"log_config": "no.xml"}, {}, "--log-config file not found: no.xml"),
        ({"cpp_log_config": "no.xml"}, {}, "--cpp-log-config file not found: no.xml"),
        ({"model_store": "no"}, {}, "--model-store directory not found: no"),
        ({"workflow_store": "no"}, {}, "--workflow-store directory not found: no"),
        ({}, {"TEMP": "no"}, "Invalid temp directory: no, please check TEMP environment variable."),
    ],
)
def test_launcher_errors(place: Path, flags: dict[str, str], environ: dict[str, str], message: str) -> None:
    assert failure("", environ, **flags).startswith(message)


def test_model_store_is_mandatory(place: Path) -> None:
    assert failure("", store=False) == "Missing mandatory parameter --model-store"
    assert load("", store=False, model_store="store").model_store == place / "store"


def test_precedence(place: Path) -> None:
    environ = {
        "TS_ENABLE_MODEL_API": "false",
        "TS_JOB_QUEUE_SIZE": "9",
        "TS_TOKEN_EXPIRATION_TIME_MIN": "0.5",
    }
    text = "enable_model_api=false\njob_queue_size=5\n"
    assert load(text, environ, enable_model_api=True).enable_model_api
    config = load("enable_envvars_config=true\n" + text, environ, enable_model_api=True)
    assert not config.enable_model_api
    assert (config.job_queue_size, config.token_expiration_min) == (9, 0.5)
    assert load(text, environ).job_queue_size == 5
    assert load(text, environ | {"TS_ENABLE_ENVVARS_CONFIG": "true"}).job_queue_size == 5


def test_error_in_a_variable_names_it(place: Path) -> None:
    message = failure("enable_envvars_config=true", {"TS_JOB_QUEUE_SIZE": "x"})
    assert message == "environment variable TS_JOB_QUEUE_SIZE: 'x' is not a whole number"


def test_variables_that_always_count(place: Path) -> None:
    assert load("", {"TS_OPEN_INFERENCE_PROTOCOL": "oip"}).ts_open_inference_protocol
    assert load("", {"TS_MODEL_SERVER_HOME": "/opt"}).model_server_home == Path("/opt")
    config = load("", {"LOG_LOCATION": "l", "METRICS_LOCATION": "/m", "TEMP": str(place)}, run_dir="r")
    assert (config.log_dir, config.metrics_dir) == (place / "l", Path("/m"))
    assert (config.temp_dir, config.run_dir) == (place, place / "r")
    assert load("", {"TEMP": str(place)}).run_dir == place / f"wsgi-ts-{os.getuid()}"


def test_allowed_urls_from_the_environment(place: Path) -> None:
    environ = {"TS_ALLOWED_URLS": "https://only/.*"}
    assert load("allowed_urls=file://.*", environ).allowed_urls == ("file://.*",)
    assert load("enable_envvars_config=true", environ).allowed_urls == ("file://.*", "http(s)?://.*")
    assert load("use_env_allowed_urls=true", environ).allowed_urls == ("https://only/.*",)


def test_startup_models(place: Path) -> None:
    for name in ("b.mar", "a.tar.gz", "c.model", "notes.txt", ".hidden.mar"):
        (place / "store" / name).touch()
    (place / "store" / "folder").mkdir()
    (place / "store" / "folder" / "handler.py").touch()
    # What a volume of its own has at its top.
    (place / "store" / "lost+found").mkdir()
    config = load("", models=("ALL",))
    assert config.initial_models == "ALL"
    assert [url for _, url in config.load_models] == ["a.tar.gz", "b.mar", "c.model", "folder"]
    flags = load("load_models=x.mar", models=("a=b.mar", "c.mar", "d=http://h/x.mar?k=v,http://h/y.mar?k=v"))
    assert flags.load_models == (
        ("a", "b.mar"),
        (None, "c.mar"),
        ("d", "http://h/x.mar?k=v"),
        (None, "http://h/y.mar?k=v"),
    )
    one_word = load("", models=("a=b.mar c.mar  d=my model.model\te=http://h/x.tar.gz x y",))
    assert one_word.load_models == (
        ("a", "b.mar"),
        (None, "c.mar"),
        ("d", "my model.model"),
        ("e", "http://h/x.tar.gz"),
        (None, "x y"),
    )
    assert load("load_models= x.mar , y.mar,").load_models == ((None, "x.mar"), (None, "y.mar"))
    assert load("load_models=").load_models == ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(sorted(property_settings())), st.text(max_size=20))))
def test_any_values_load_or_are_refused_on_one_line(place: Path, entries: list[tuple[str, str]]) -> None:
    text = "".join(f"{key}={java_escape(value, key=False)}\n" for key, value in entries)
    try:
        config = load(text)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert Config.from_json(config.to_json()) == config
        assert "\n" not in "".join(config.warnings)


# --- model-config.yaml ---


def test_model_yaml_defaults() -> None:
    yaml = parse_model_yaml({})
    assert yaml == ModelYaml()
    assert (yaml.response_timeout_s, yaml.startup_timeout_s, yaml.max_retry_timeout_s) == (120, 120, 300)


def test_model_yaml_all_keys() -> None:
    fields = {
        "minWorkers": 1, "maxWorkers": 2, "batchSize": 4, "maxBatchDelay": 50, "responseTimeout": 7,
        "startupTimeout": 8, "deviceType": "GPU", "deviceIds": [1, 0], "parallelType": "pp",
        "parallelLevel": 4,
        "torchrun": {"nproc-per-node": 4, "rdzv-backend": "static", "master-addr": "h", "master-port": 29500,
                     "OMP_NUMBER_THREADS": 2, "monitor-interval": 1},
        "maxRetryTimeoutInSec": 9, "clientTimeoutInMills": 100, "jobQueueSize": 3, "useJobTicket": True,
        "sequenceBatching": True, "continuousBatching": True, "asyncCommunication": False, "useVenv": True,
        "sequenceMaxIdleMSec": 5, "sequenceTimeoutMSec": 6, "maxSequenceJobQueueSize": 10,
        "maxNumSequence": 11,
        "batchPolicy": "Fixed", "batching": "pkg:Policy", "weightsOnly": False, "handler": {"profile": True},
        "threadsPerWorker": 3, "maxExecutions": 1,
    }  # fmt: skip
    yaml = parse_model_yaml(fields)
    assert yaml.warnings == ()
    assert set(fields) - {"handler"} == {row.key for row in settings_of(ModelYaml).values()}
    assert (yaml.min_workers, yaml.max_workers, yaml.batch_size, yaml.max_batch_delay_ms) == (1, 2, 4, 50)
    assert (yaml.device_type, yaml.device_ids, yaml.parallel_type, yaml.parallel_level) == (
        "gpu",
        (1, 0),
        "pp",
        4,
    )
    assert yaml.torchrun is not None
    assert (yaml.torchrun.nproc_per_node, yaml.torchrun.master_port) == (4, 29500)
    assert (yaml.torchrun.omp_number_threads, yaml.torchrun.rdzv_backend) == (2, "static")
    assert (yaml.max_retry_timeout_s, yaml.client_timeout_ms, yaml.job_queue_size) == (9, 100, 3)
    assert yaml.use_job_ticket and yaml.sequence_batching and yaml.continuous_batching
    assert yaml.use_venv and not yaml.async_communication
    assert (yaml.sequence_max_idle_ms, yaml.sequence_timeout_ms) == (5, 6)
    assert (yaml.max_sequence_queue, yaml.max_sequences) == (10, 11)
    assert (yaml.batch_policy, yaml.weights_only, yaml.threads_per_worker) == ("fixed", False, 3)
    assert yaml.raw["handler"] == {"profile": True}


@pytest.mark.parametrize(
    ("fields", "level", "warning"),
    [
        ({"parallelType": "pp", "parallelLevel": 2}, 4, "parallelLevel: torchrun.nproc-per-node, 4, counts instead"),
        ({}, 0, "torchrun.nproc-per-node: has no effect without parallelType (pp, tp or pptp)"),
    ],
)
def test_what_torchrun_says_beside_parallel_keys(fields: dict[str, Any], level: int, warning: str) -> None:
    yaml = parse_model_yaml({**fields, "torchrun": {"nproc-per-node": 4}})
    assert yaml.parallel_level == level
    assert yaml.warnings == (f"model-config.yaml: key {warning}",)
    check_parallel(yaml)


@pytest.mark.parametrize(
    ("key", "value", "warning"),
    [
        ("minWorkers", "two", "'two' is not a whole number"),
        ("batchSize", 2.5, "2.5 is not a whole number"),
        ("batchSize", True, "True is not a whole number"),
        ("maxBatchDelay", -1, "-1 is not between 0 and 2147483647"),
        ("responseTimeout", 0, "0 is not between 1 and 2147483647"),
        ("useJobTicket", "on", "'on' is neither true nor false"),
        ("deviceType", "tpu", "'tpu' is none of: cpu, gpu"),
        ("deviceIds", [0, "a"], "'a' is not a whole number"),
        ("deviceIds", [-1], "[-1] is not a list of GPU numbers from 0"),
        ("parallelType", "xx", "'xx' is none of: pp, tp, pptp, custom"),
        ("torchrun", 3, "3 is not a section of settings"),
        ("batchPolicy", ["a"], "['a'] is none of: adaptive, fixed, none"),
        ("weightsOnly", {}, "{} is neither true nor false"),
    ],
)
def test_model_yaml_wrong_types_keep_the_default(key: str, value: object, warning: str) -> None:
    yaml = parse_model_yaml({key: value})
    assert yaml.warnings == (f"model-config.yaml: key {key}: {warning}; taken as not given",)
    assert dataclasses.replace(yaml, raw={}, warnings=()) == ModelYaml()


@pytest.mark.parametrize("key", ["continuousBatching", "sequenceBatching"])
def test_model_yaml_asynchronous_requests_are_not_batched(key: str) -> None:
    yaml = parse_model_yaml({"asyncCommunication": True, key: True, "sequenceMaxIdleMSec": 1000})
    assert yaml.async_communication
    assert not yaml.continuous_batching
    assert not yaml.sequence_batching
    assert yaml.warnings == (f"model-config.yaml: key {key}: does not go with asyncCommunication; it is off",)


def test_model_yaml_lifts_small_numbers() -> None:
    yaml = parse_model_yaml({"minWorkers": 0, "maxWorkers": -3, "batchSize": 0, "maxNumSequence": 0})
    assert (yaml.min_workers, yaml.max_workers, yaml.batch_size, yaml.max_sequences) == (1, 0, 1, 1)
    assert yaml.warnings == ()


def test_parallel_level_counts_only_with_a_type() -> None:
    assert parse_model_yaml({"parallelLevel": 4}).parallel_level == 0
    assert parse_model_yaml({"parallelLevel": 4, "parallelType": "custom"}).parallel_level == 4


MODELS = {"m": {"1.0": {"batchSize": 3, "maxBatchDelay": 30, "responseTimeout": 33, "startupTimeout": 34,
                        "minWorkers": 5, "maxWorkers": 6}}}  # fmt: skip


def test_precedence_of_batch_settings() -> None:
    config = Config(models=MODELS)
    yaml = parse_model_yaml({"batchSize": 2, "maxBatchDelay": 20})
    given_ = RegisterArguments(batch_size=1, max_batch_delay=0)

    def batch(yaml: ModelYaml | None, arguments: RegisterArguments, version: str) -> tuple[int, int]:
        chosen = effective_settings(config, yaml, arguments, "m", version, cores=2)
        return chosen.batch_size, chosen.max_batch_delay_ms

    assert batch(yaml, given_, "1.0") == (1, 0)
    assert batch(yaml, RegisterArguments(batch_size=0, max_batch_delay=-1), "1.0") == (2, 20)
    assert batch(parse_model_yaml({}), RegisterArguments(), "1.0") == (3, 30)
    assert batch(None, RegisterArguments(), "2.0") == (1, 100)


def test_precedence_of_timeouts() -> None:
    config = Config(models=MODELS, default_response_timeout=44, default_startup_timeout=45)
    given_ = RegisterArguments(response_timeout=55, startup_timeout=0)

    def times(yaml: ModelYaml | None, arguments: RegisterArguments, version: str) -> tuple[int, int]:
        chosen = effective_settings(config, yaml, arguments, "m", version, cores=2)
        return chosen.response_timeout_s, chosen.startup_timeout_s

    assert times(parse_model_yaml({"responseTimeout": 11}), given_, "1.0") == (11, 120)
    assert times(None, given_, "1.0") == (33, 34)
    assert times(None, given_, "2.0") == (55, 0)
    assert times(None, RegisterArguments(response_timeout=-1), "2.0") == (44, 45)


def test_workers_at_registration() -> None:
    config = Config(models=MODELS)

    def workers(fields: dict[str, int] | None, initial: int | None, default: int = 0) -> tuple[int, int]:
        yaml = None if fields is None else parse_model_yaml(fields)
        chosen = effective_settings(
            dataclasses.replace(config, default_workers_per_model=default),
            yaml, RegisterArguments(initial_workers=initial), "m", "1.0", cores=8,
        )  # fmt: skip
        return chosen.min_workers, chosen.max_workers

    assert workers({"minWorkers": 2, "maxWorkers": 3}, 7) == (2, 3)
    assert workers({"minWorkers": 2}, 7) == (7, 7)
    assert workers(None, None) == (0, 0)
    assert workers(None, None, default=4) == (4, 4)
    assert workers(None, -1, default=4) == (0, 0)


def test_workers_at_startup() -> None:
    def workers(config: Config, fields: dict[str, int] | None, version: str, gpus: int = 0) -> tuple[int, int]:
        yaml = None if fields is None else parse_model_yaml(fields)
        chosen = effective_settings(config, yaml, None, "m", version, cores=8, gpus=gpus)
        return chosen.min_workers, chosen.max_workers

    config = Config(models=MODELS)
    assert workers(config, {"minWorkers": 2, "maxWorkers": 3}, "1.0") == (2, 3)
    assert workers(config, None, "1.0") == (5, 6)
    assert workers(config, None, "2.0") == (8, 8)
    assert workers(config, None, "2.0", gpus=2) == (2, 2)
    assert workers(dataclasses.replace(config, default_workers_per_model=3), None, "2.0", gpus=2) == (3, 3)
    assert workers(dataclasses.replace(config, debug=True), None, "2.0") == (1, 1)
    chosen = effective_settings(config, parse_model_yaml({"minWorkers": 3}), None, "m", "1.0", cores=1)
    assert chosen.warnings == ("Invalid model config in mar, minWorkers:3, maxWorkers:0",)


def test_other_settings_of_a_model() -> None:
    config = Config(job_queue_size=10, batch_policy="none", torch_load_weights_only=False)
    chosen = effective_settings(config, None, None, "m", "1.0", cores=1)
    assert (chosen.job_queue_size, chosen.batch_policy, chosen.weights_only) == (10, "none", False)
    fields = {"jobQueueSize": 5, "batchPolicy": "fixed", "weightsOnly": True, "clientTimeoutInMills": 9}
    chosen = effective_settings(config, parse_model_yaml(fields), None, "m", "1.0", cores=1)
    assert (chosen.job_queue_size, chosen.batch_policy, chosen.weights_only) == (5, "fixed", True)
    assert parse_model_yaml(fields).client_timeout_ms == 9


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.8.9.1:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("unix:/tmp/s", True),
        ("http://0.0.0.0:1", False),
        ("http://10.0.0.1:1", False),
        ("http://[::]:1", False),
        ("http://models.example:1", False),
    ],
)
def test_who_can_reach_an_address(text: str, local: bool) -> None:
    assert parse_address(text).is_local is local


# Tokens


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("", False),
        ("inference_address=unix:/tmp/x.sock\nmanagement_address=http://[::1]:8081", False),
        ("metrics_address=https://localhost:8082", False),
        ("inference_address=http://0.0.0.0:8080", True),
        ("management_address=https://192.0.2.7:8081", True),
        ("inference_address=http://models.example.org:8080", True),
        ("metrics_address=http://0.0.0.0:8082", True),
        ("grpc_inference_address=0.0.0.0", True),
        ("grpc_management_address=::1", False),
        ("metrics_address=http://0.0.0.0:8082\nenable_metrics_api=false", False),
        ("disable_token_authorization=false", True),
        ("token_expiration_min=5", True),
        ("enable_model_api=true", True),
        ("enable_model_api=false", False),
        ("enable_model_api=true\ndisable_token_authorization=true", False),
        ("token_expiration_min=5\ndisable_token_authorization=true", False),
        ("disable_token_authorization=true\ninference_address=http://0.0.0.0:8080", False),
    ],
)
def test_when_requests_need_a_token(place: Path, text: str, on: bool) -> None:
    assert load(text).token_authorization is on


def test_who_decides_on_tokens(place: Path) -> None:
    said = {"TS_DISABLE_TOKEN_AUTHORIZATION": "false"}
    assert load("", said).token_authorization
    assert not load("", said, disable_token_auth=True).token_authorization
    assert not load("disable_token_authorization=true", said).token_authorization
    # The variable alone cannot switch them off: TorchServe does not heed it then.
    everywhere = "inference_address=http://0.0.0.0:8080"
    assert load(everywhere, {"TS_DISABLE_TOKEN_AUTHORIZATION": "true"}).token_authorization
    assert load("enable_envvars_config=true", said, disable_token_auth=True).token_authorization
    assert load("", {}, enable_model_api=True).token_authorization
    assert not load("", {}, enable_model_api=True, disable_token_auth=True).token_authorization
    assert not load("disable_token_authorization=false", disable_token_auth=True).token_authorization
    assert load("enable_envvars_config=true\ndisable_token_authorization=true", said).token_authorization
    config = load("token_expiration_min=5\nenable_envvars_config=true", {"TS_TOKEN_EXPIRATION_TIME_MIN": "0.5"})
    assert config.token_expiration_min == 0.5


# -- OpenTelemetry's own variables


def test_opentelemetry_s_variables_count_where_the_keys_are_not_given(place: Path) -> None:
    config = load("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_SAMPLER": "always_off"})
    assert (config.otlp_endpoint, config.trace_sample_ratio) == ("http://c:4318", 0.0)
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
    assert load("", sampler).trace_sample_ratio == 0.01
    given = load("otlp_endpoint=http://own:1\ntrace_sample_ratio=0.5", {**sampler, "OTEL_EXPORTER_OTLP_ENDPOINT": "x"})
    assert (given.otlp_endpoint, given.trace_sample_ratio) == ("http://own:1", 0.5)


def test_the_variable_for_traces_goes_before_the_one_for_all(place: Path) -> None:
    both = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:2/own"}
    assert load("", both).otlp_endpoint == "http://c:2/own"


@pytest.mark.parametrize("variable", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_opentelemetry_can_be_switched_off(place: Path, variable: dict[str, str]) -> None:
    assert load("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", **variable}).otlp_endpoint == ""


@pytest.mark.parametrize("ratio", ["1.5", "-0.1"])
def test_a_ratio_is_from_0_to_1(place: Path, ratio: str) -> None:
    assert "trace_sample_ratio" in failure(f"trace_sample_ratio={ratio}")
