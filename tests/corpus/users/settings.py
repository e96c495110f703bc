"""config.properties, snapshots and model-config.yaml as people and scripts write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: What most of the files below say of version 1.0 of the model `m`.
ENTRY = {"minWorkers": 2, "maxWorkers": 3, "batchSize": 4, "maxBatchDelay": 50}
_PLAIN = '"minWorkers": 2, "maxWorkers": 3, "batchSize": 4, "maxBatchDelay": 50'


def models(entry: str) -> str:
    """The key `models` with these settings of version 1.0 of `m`."""
    return f'models={{"m": {{"1.0": {{{entry}}}}}}}'


@dataclass(frozen=True)
class UsersProperties:
    """One config.properties.

    Attributes:
        name: says what is special.
        data: the file.
        entry: what it says of version 1.0 of the model `m`.
        settings: other settings that it has to set.
    """

    name: str
    data: str | bytes
    entry: dict[str, int] | None = None
    settings: tuple[tuple[str, Any], ...] = ()


PROPERTIES = [
    UsersProperties("one line", models(_PLAIN), ENTRY),
    UsersProperties(
        "continued lines",
        'models={\\\n  "m": {\\\n    "1.0": {\\\n        "defaultVersion": true,\\\n        "marName": "m.mar",\\\n'
        '      "minWorkers": 2,\\\n      "maxWorkers": 3,\\\n      "batchSize": 4,\\\n      "maxBatchDelay": 50\\\n'
        "    }\\\n  }\\\n}\njob_queue_size=7\n",
        ENTRY,
        (("job_queue_size", 7),),
    ),
    UsersProperties("continued lines of Windows", 'models={ \\\r\n\t"m": {"1.0": {\\\r\n' + _PLAIN + "}}}\r\n", ENTRY),
    UsersProperties("last line continued into nothing", models(_PLAIN) + "\\", ENTRY),
    UsersProperties(
        "numbers in quotes",
        models('"minWorkers": "2", "maxWorkers": "3", "batchSize": "4", "maxBatchDelay": "50"'),
        ENTRY,
    ),
    UsersProperties(
        "numbers with a point",
        models('"minWorkers": 2.0, "maxWorkers": 3., "batchSize": 4.0, "maxBatchDelay": 5e1'),
        ENTRY,
    ),
    UsersProperties(
        "numbers with blanks",
        models('"minWorkers": " 2 ", "maxWorkers": "3 ", "batchSize": 4, "maxBatchDelay": "50.0"'),
        ENTRY,
    ),
    UsersProperties(
        "single quotes",
        "models={'m': {'1.0': {'minWorkers': 2, 'maxWorkers': 3, 'batchSize': 4, 'maxBatchDelay': 50}}}",
        ENTRY,
    ),
    UsersProperties(
        "no quotes", "models={m: {1.0: {minWorkers: 2, maxWorkers: 3, batchSize: 4, maxBatchDelay: 50}}}", ENTRY
    ),
    UsersProperties(
        "signs of a map", "models={m={1.0={minWorkers=2; maxWorkers=>3; batchSize=4; maxBatchDelay=50}}}", ENTRY
    ),
    UsersProperties("quotes escaped for the shell", models(_PLAIN.replace('"', '\\"')), ENTRY),
    UsersProperties("colons escaped, as Java writes them", models(_PLAIN).replace(":", "\\:"), ENTRY),
    UsersProperties("a comma too many", models(_PLAIN + ","), ENTRY),
    UsersProperties("unicode escapes", models(_PLAIN).replace('"m"', '"\\u006d"'), ENTRY),
    UsersProperties(
        "settings that are null or not above 0", models('"minWorkers": null, "maxWorkers": 0, "batchSize": -1'), {}
    ),
    UsersProperties("a boolean in quotes", models('"defaultVersion": "True", ' + _PLAIN), ENTRY),
    UsersProperties(
        "blanks around everything", "  job_queue_size   =  7  \n" + models(_PLAIN), ENTRY, (("job_queue_size", 7),)
    ),
    UsersProperties(
        "colon for a separator", "job_queue_size: 7\nmodels : {'m': {'1.0': {}}}", {}, (("job_queue_size", 7),)
    ),
    UsersProperties(
        "blank for a separator",
        "job_queue_size 7\nbatch_policy\tfixed",
        None,
        (("job_queue_size", 7), ("batch_policy", "fixed")),
    ),
    UsersProperties("byte order mark", "\ufeffjob_queue_size=7\r\n", None, (("job_queue_size", 7),)),
    UsersProperties(
        "old Macintosh line ends", "job_queue_size=7\rbatch_policy=fixed\r", None, (("batch_policy", "fixed"),)
    ),
    UsersProperties(
        "comment in Latin-1", "# für den Server\njob_queue_size=7\n".encode("latin-1"), None, (("job_queue_size", 7),)
    ),
    UsersProperties(
        "value in Latin-1",
        "cors_allowed_origin=http://größe".encode("latin-1"),
        None,
        (("cors_allowed_origin", "http://größe"),),
    ),
    UsersProperties(
        "indented by a script",
        "    job_queue_size=7\n        batch_policy=fixed\n",
        None,
        (("job_queue_size", 7), ("batch_policy", "fixed")),
    ),
    UsersProperties(
        "text above the keys",
        '"""\n  Config.properties docs:\n  - https://example.org/configuration.md\n"""\njob_queue_size=7\n',
        None,
        (("job_queue_size", 7),),
    ),
    UsersProperties(
        "names of models",
        "load_models=a.mar, n=b.mar ,c.mar,",
        None,
        (("load_models", ((None, "a.mar"), ("n", "b.mar"), (None, "c.mar"))),),
    ),
    UsersProperties(
        "names of models, as Java writes them", "load_models=n\\=b.mar", None, (("load_models", (("n", "b.mar"),)),)
    ),
    UsersProperties(
        "names of models over lines",
        "load_models=a.mar,\\\n            b.mar",
        None,
        (("load_models", ((None, "a.mar"), (None, "b.mar"))),),
    ),
]

#: A line that cannot be meant, and what the start has to say of it.
REFUSED = [
    (
        models('"batchSize": "many"'),
        "config.properties:1: key models: model 'm', version '1.0': batchSize: 'many' is not a whole number",
    ),
    (models('"batchSize": 2.5'), "batchSize: 2.5 is not a whole number"),
    (models('"batchSize": true'), "batchSize: True is not a whole number"),
    (models('"batchSize": [4]'), "batchSize: [4] is not a whole number"),
    (models('"batchSize": 1e400'), "batchSize: inf is not a whole number"),
    (models('"maxWorkers": ""'), "maxWorkers: '' is not a whole number"),
    (models('"defaultVersion": "yes"'), "defaultVersion: 'yes' is neither true nor false"),
    (models('"marName": {}'), "marName: {} is not a text"),
    (models('"batchSize": 1, "batchSize": 2'), "not valid JSON: key 'batchSize' is there twice"),
    ('models={"m": {"1.0": {}}, "m": {"2.0": {}}}', "not valid JSON: key 'm' is there twice"),
    (models('"batchSize" 4'), "not valid JSON: a colon is missing after 'batchSize', near '4}}}'"),
    ('models={"m": {"1.0": {"batchSize": 4}}', "not valid JSON: a comma or '}' is missing, at the end"),
    (
        'models={\n  "m": {\n    "1.0": {"batchSize": 4}\n  }\n}',
        "config.properties:1: key models: not valid JSON: a key or a closing brace is missing, at the end; if it goes"
        " on in the next line, this one needs a backslash at its end",
    ),
    ('models={"m": {"1.0": {"batchSize: 4}}}', "not valid JSON: a closing quote is missing"),
    ('model_snapshot={"modelCount": 1', "key model_snapshot: not valid JSON"),
]

#: What is warned of, because nobody reads it.
UNKNOWN = [
    (models('"batchsize": 4'), "unknown setting 'batchsize' is ignored; did you mean batchSize?"),
    (models('"queueSize": 4'), "unknown setting 'queueSize' is ignored"),
]

_JAVA = (
    "#Saving snapshot\n#Thu Jun 05 14:03:11 UTC 2025\n"
    "inference_address=http\\://127.0.0.1\\:8080\nmanagement_address=http\\://127.0.0.1\\:8081\n"
    "load_models=m\\=m.mar\nversion=0.12.0\nnumber_of_gpu=0\npython=/opt/venv/bin/python3\n"
    "tsConfigFile=/home/model-server/config.properties\nNUM_WORKERS=1\nmetrics_format=prometheus\n"
)
_SAVED = (
    '{\\n  "name"\\: "20250605140311123-startup.cfg",\\n  "modelCount"\\: 1,\\n  "created"\\: 1749132191123,\\n'
    '  "models"\\: {\\n    "m"\\: {\\n      "1.0"\\: {\\n        "defaultVersion"\\: true,\\n'
    '        "marName"\\: "m.mar",\\n        "minWorkers"\\: 2,\\n        "maxWorkers"\\: 3,\\n'
    '        "batchSize"\\: 4,\\n        "maxBatchDelay"\\: 50,\\n'
    '        "responseTimeout"\\: 120,\\n        "startupTimeout"\\: 120,\\n        "runtimeType"\\: "python"\\n'
    "      }\\n    }\\n  }\\n}"
)


def _snapshot(entry: str, rest: str = "") -> str:
    return f'model_snapshot={{"name":"startup.cfg","modelCount":1,"models":{{"m":{{"1.0":{{{entry}}}}}}}{rest}}}\n'


#: Snapshots of the model `m` with `ENTRY`; `{"key": value}` for what differs from it.
SNAPSHOTS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "as TorchServe 0.12 saves it",
        f"{_JAVA}model_snapshot={_SAVED}\n",
        {"startupTimeout": 120, "runtimeType": "python"},
    ),
    ("as KServe has it", _snapshot('"defaultVersion":true,"marName":"m.mar",' + _PLAIN), {}),
    (
        "indented, over lines",
        '   model_snapshot={ \\\n "models": { "m": { "1.0": { "marName": "m.mar", "defaultVersion": true, \\\n'
        f" {_PLAIN} }} }} }} }}\n",
        {},
    ),
    (
        "texts for numbers",
        _snapshot(
            '"defaultVersion":"true","marName":"m.mar","minWorkers":"2","maxWorkers":3.0,"batchSize":"4",'
            '"maxBatchDelay":"50"'
        ),
        {},
    ),
    (
        "a delay that was never given",
        _snapshot(
            '"defaultVersion":true,"marName":"m.mar","minWorkers":2,"maxWorkers":3,"batchSize":4,"maxBatchDelay":-10000'
        ),
        {"maxBatchDelay": 0},
    ),
    (
        "a folder by a path with a slash at its end",
        _snapshot('"defaultVersion":true,"marName":"",' + _PLAIN),
        {"marName": "m"},
    ),
    (
        "a runtime in capitals, nulls",
        _snapshot(f'"defaultVersion":true,"marName":"m.mar","runtimeType":"PYTHON3","responseTimeout":null,{_PLAIN}'),
        {"runtimeType": "python3"},
    ),
    (
        "by hand",
        f"model_snapshot={{models: {{m: {{'1.0': {{defaultVersion: TRUE, marName: m.mar, {_PLAIN}}}}}}}}}\n",
        {},
    ),
]

#: A snapshot that cannot be meant, and what the start has to say of it.
REFUSED_SNAPSHOTS = [
    (
        _snapshot('"marName":"m.mar","batchSize":"many"'),
        "model 'm', version '1.0': batchSize: 'many' is not a whole number",
    ),
    (
        _snapshot('"marName":"m.mar","defaultVersion":1'),
        "model 'm', version '1.0': defaultVersion: 1 is neither true nor false",
    ),
    (_snapshot('"batchSize":4'), "model 'm', version '1.0': no marName"),
]


@dataclass(frozen=True)
class UsersYaml:
    """One model-config.yaml: its fields as the server has them, and what it warns of."""

    name: str
    text: str
    fields: tuple[tuple[str, Any], ...]
    warnings: tuple[str, ...] = ()


YAMLS = [
    UsersYaml(
        "numbers in quotes",
        "minWorkers: '2'\nmaxWorkers: \" 3 \"\nbatchSize: '4.0'\n",
        (("min_workers", 2), ("max_workers", 3), ("batch_size", 4)),
    ),
    UsersYaml(
        "numbers with a point", "batchSize: 4.0\nmaxBatchDelay: 50.0\n", (("batch_size", 4), ("max_batch_delay_ms", 50))
    ),
    UsersYaml(
        "times in quotes",
        "responseTimeout: '300'\nstartupTimeout: '600'\n",
        (("response_timeout_s", 300), ("startup_timeout_s", 600)),
    ),
    UsersYaml(
        "booleans in quotes",
        "useJobTicket: 'true'\nuseVenv: \"False\"\n",
        (("use_job_ticket", True), ("use_venv", False)),
    ),
    UsersYaml(
        "yes and on",
        "useJobTicket: yes\ncontinuousBatching: on\n",
        (("use_job_ticket", True), ("continuous_batching", True)),
    ),
    UsersYaml(
        "words in capitals",
        "deviceType: GPU\nparallelType: ' TP '\nparallelLevel: '2'\n",
        (("device_type", "gpu"), ("parallel_type", "tp"), ("parallel_level", 2)),
    ),
    UsersYaml("one GPU, GPUs in quotes", "deviceIds: ['0', 1.0]\n", (("device_ids", (0, 1)),)),
    UsersYaml("one GPU without a list", "deviceIds: 1\n", (("device_ids", (1,)),)),
    UsersYaml(
        "torchrun in quotes",
        "parallelType: pp\ntorchrun:\n    nproc-per-node: '4'\n    OMP_NUMBER_THREADS: '2'\n",
        (("parallel_level", 4),),
    ),
    UsersYaml("Windows, byte order mark, document mark", "\ufeff---\r\nbatchSize: 4\r\n", (("batch_size", 4),)),
    UsersYaml(
        "numbers of YAML", "batchSize: 0x10\nmaxBatchDelay: 1_000\n", (("batch_size", 16), ("max_batch_delay_ms", 1000))
    ),
    UsersYaml("key given twice", "batchSize: 2\nbatchSize: 4\n", (("batch_size", 4),)),
    UsersYaml(
        "wrong in a section",
        "parallelType: pp\n# comment\ntorchrun:\n  nproc-per-node: 2\n\n  master-port: none\n",
        (("parallel_level", 2),),
        ("model-config.yaml:6: key torchrun.master-port: 'none' is not a whole number; taken as not given",),
    ),
    UsersYaml("null", "batchSize:\nminWorkers: ~\n", (("batch_size", 0), ("min_workers", 0))),
    UsersYaml(
        "what cannot be meant",
        "batchSize: 2.5\nuseJobTicket: maybe\nresponseTimeout: 5m\ndeviceIds: all\n",
        (("batch_size", 0), ("use_job_ticket", False), ("response_timeout_s", 120), ("device_ids", None)),
        (
            "model-config.yaml:1: key batchSize: 2.5 is not a whole number; taken as not given",
            "model-config.yaml:3: key responseTimeout: '5m' is not a whole number; taken as not given",
            "model-config.yaml:2: key useJobTicket: 'maybe' is neither true nor false; taken as not given",
            "model-config.yaml:4: key deviceIds: 'all' is not a whole number; taken as not given",
        ),
    ),
]
