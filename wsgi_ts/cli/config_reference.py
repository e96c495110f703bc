"""`python -m wsgi_ts.cli.config_reference > docs/configuration.md`: the page of all settings, from their tables.

A test compares the page with what this module prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wsgi_ts.models.model_yaml import ModelYaml, TorchrunOptions
from wsgi_ts.settings.config import env_variable, property_settings
from wsgi_ts.settings.table import Setting, settings_of

#: Headings of the page, each before the key that it begins with.
_HEADINGS = {
    "inference_address": "Addresses and protocols",
    "keystore": "TLS",
    "web_workers": "Threads and processes",
    "model_store": "Models and model workers",
    "enable_model_api": "Who may do what",
    "metrics_mode": "Metrics and logs",
    "enable_envvars_config": "The launcher's own",
}
#: Defaults that are not the same on every machine.
_DEFAULTS = {"python": "the server's own"}

_INTRODUCTION = """\
# Configuration

<!-- Printed by `python -m wsgi_ts.cli.config_reference` from the tables in wsgi_ts/settings and wsgi_ts/models -->

Two files hold settings: `config.properties` those of the server, `model-config.yaml` (packed into an archive with
`torch-model-archiver --config-file`) those of one model.

## Give the server a setting

In a file, with `torchserve --start --ts-config config.properties`:

```properties
# where predictions are served
inference_address=http://0.0.0.0:8080
management_address=http://127.0.0.1:8081
job_queue_size=200
model_store=$$HOME$$/model-store
```

* The syntax is that of Java's properties files: `key=value`, `#` comments, backslash escapes; a backslash at the end of
  a line continues it. Files are UTF-8.
* `models` and `model_snapshot` are JSON, as TorchServe reads it: single quotes, names without quotes and comments pass,
  and `"3"` or `3.0` is 3. A value that is no number, or a key that stands twice, stops the start.
* `$$NAME$$` stands for the environment variable `NAME`; the server does not start when it is not set.
* The file is the first of: the environment variable `TS_CONFIG_FILE`, `--ts-config`, the newest snapshot in
  `logs/config` (not with `--ncs`), `config.properties` in the current directory.
* An unknown key is warned of, with the nearest known one. A wrong value stops the start: the message names file, line,
  key and reason. Values with which TorchServe starts are warned of in the same words: booleans other than `true` and
  `false`, and unknown words for `metrics_mode` and `service_envelope`.

By environment variable, where the file says `enable_envvars_config=true`: `TS_JOB_QUEUE_SIZE=50`. The tables name the
variable of each key. These count always: `TS_OPEN_INFERENCE_PROTOCOL` (`oip` or `true`), `TS_MODEL_SERVER_HOME`.
`TS_ALLOWED_URLS` counts where the file says `use_env_allowed_urls=true`.

By flag: `--model-store`, `--workflow-store`, `--models` (`load_models`), `--plugins-path`, `--cpp-log-config`,
`--disable-token-auth` (`disable_token_authorization=true`), `--enable-model-api` (`enable_model_api=true`).

Where several speak: environment before flag before file before default.

`LOG_LOCATION` and `METRICS_LOCATION` say where the logs go (`logs` by default), `TEMP` where temporary files do.

## Differences from TorchServe

* Booleans are `true` in any case; everything else is false, as in TorchServe, and what is not `false` is warned of.
* A number, an address or a path that is empty counts as not given, with a warning; TorchServe does not start with it.
* Keys marked *ours* are unknown to TorchServe, which ignores them.
* Keys with **no effect here** configure the Java machine; the server says once at the start that they can be removed.

## Keys of config.properties
"""

_MODEL_CONFIG = """
## Give a model settings

```yaml
# model-config.yaml
minWorkers: 1
maxWorkers: 4
batchSize: 16
maxBatchDelay: 20
responseTimeout: 30
handler:              # whatever the server does not know is for the handler:
  mapping: labels.json  # context.model_yaml_config["handler"]["mapping"]
```

```
torch-model-archiver --model-name m --version 1.0 --handler handler.py --config-file model-config.yaml
```

A number or boolean in quotes is one (`"16"`, `16.0`). Any other value of the wrong type is warned of in the log, and
the default holds. Which word counts:

* batch size and batch delay: register call before model-config.yaml before the `models` key before 1 and 100 ms;
* response and startup time-out: model-config.yaml (once there is one its own default of 120 s counts, too) before the
  `models` key before the register call before `default_response_timeout` and `default_startup_timeout`;
* workers of a registered model: model-config.yaml, if it gives a valid pair, before `initial_workers` before
  `default_workers_per_model`;
* workers of a startup model: model-config.yaml, likewise, before the `models` key before `default_workers_per_model`
  before one per GPU, or core where there is no GPU;
* job queue: model-config.yaml before `job_queue_size`;
* everything else: model-config.yaml.

The `models` key gives defaults by name and version, on one line or with a backslash at the end of each:

```properties
models={"m": {"1.0": {"minWorkers": 2, "maxWorkers": 4, "batchSize": 8, "maxBatchDelay": 50, "responseTimeout": 60}}}
```

### A deadline for each request

`clientTimeoutInMills: 500` gives a request 500 ms from its arrival to its answer. What has not begun by then is never
run; whoever still waits is answered 408 `RequestTimeoutException` (TorchServe drops the request without an answer). A
streamed answer that has begun is not cut.

### No queue at all

`useJobTicket: true` lets a request in only when a worker is free to take it at once; all others are answered 503 at
once. Use it behind a load balancer that tries another server after a 503.

## Keys of model-config.yaml
"""

_TORCHRUN = "\nKeys of the section `torchrun`:\n\n"


def page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    rows: list[tuple[str, ...]] = []
    for name, row in property_settings().items():
        if name in _HEADINGS:
            parts += [*_table(_KEY_COLUMNS, rows), f"\n### {_HEADINGS[name]}\n\n"]
            rows = []
        variable = env_variable(name, row)
        default = _DEFAULTS.get(name) or _shown(row.default)
        rows.append((f"`{name}`", row.kind.name, default, f"`{variable}`" if variable else "", _meaning(row)))
    parts += [*_table(_KEY_COLUMNS, rows), _MODEL_CONFIG, "\n", *_table(_YAML_COLUMNS, _yaml_rows(ModelYaml))]
    parts += [_TORCHRUN, *_table(_YAML_COLUMNS, _yaml_rows(TorchrunOptions))]
    return "".join(parts)


_KEY_COLUMNS = ("key", "value", "default", "variable", "meaning")
_YAML_COLUMNS = ("key", "value", "default", "meaning")


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    first = True
    for row in rows:
        if first:
            yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
            first = False
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n"


def _yaml_rows(table: type) -> Iterator[tuple[str, ...]]:
    for row in settings_of(table).values():
        yield f"`{row.key}`", row.kind.name, _shown(row.default), _meaning(row)


def _meaning(row: Setting) -> str:
    return f"{'' if row.has_effect else '**no effect here**: '}{row.help}{' (*ours*)' if row.ours else ''}"


def _shown(value: Any) -> str:
    """A default as one writes it; empty for none."""
    if value is None or value in ("", (), {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, int | Path) else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
