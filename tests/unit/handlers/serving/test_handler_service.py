"""Whatever a handler does, each request of its batch gets the answer it should, and the next batch works."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from wsgi_ts.handlers.metrics.metric import Sample
from wsgi_ts.handlers.serving.context import StreamClosed
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.results import Answer
from wsgi_ts.handlers.serving.service import Service
from wsgi_ts.ts_path import shim_path

LoadModel = Callable[..., Service]

POISON = '''
"""Row by row, does what the request says."""
import http, sys
import numpy, torch
from ts.utils.util import PredictionException
from ts.handler_utils.utils import send_intermediate_predict_response

class Evil(Exception):
    def __str__(self):
        raise SystemExit("evil")

def circular():
    a = []
    a.append(a)
    return a

def deep(levels):
    a = []
    for _ in range(levels):
        a = [a]
    return a

def recurse(n=0):
    return recurse(n + 1)

class Poison:
    def initialize(self, context):
        self.batches = 0

    def handle(self, data, context):
        self.batches += 1
        results = []
        for row, request in enumerate(data):
            code = request["body"]
            result = eval(code) if code.startswith("=") is False else code[1:]
            if isinstance(result, Whole):
                return result.value
            results.append(result)
        return results

class Whole:
    """What the whole batch returns."""
    def __init__(self, value):
        self.value = value

def throw(error):
    raise error

Whole.__module__ = Evil.__module__ = "elsewhere"
'''

GOOD = "=good"


@pytest.fixture
def poison(load_model: LoadModel) -> Service:
    return load_model("poison.py", {"poison.py": POISON}, batch_size=4, max_response_bytes=5000)


def run(service: Service, *bodies: Any) -> list[Answer]:
    return service.predict([Request(f"id{row}", {"body": body}, {}) for row, body in enumerate(bodies)])


def assert_alive(service: Service) -> None:
    assert run(service, GOOD) == [Answer(200, "", [], b"good")]
    assert not service.must_restart


@pytest.mark.parametrize(
    ("code", "body"),
    [
        ("'plain 你好'", "plain 你好".encode()),
        (r"b'\x00\x01\xff'", b"\x00\x01\xff"),
        ("bytearray(b'abc')", b"abc"),
        ("[1, 2, 3]", b"[\n  1,\n  2,\n  3\n]"),
        ("7", b"7"),
        ("0.5", b"0.5"),
        ("True", b"true"),
        ("None", b"null"),
        ("{}", b"{}"),
        ("float('nan')", b"NaN"),
        (
            "{'a': 1, 'b': [None], 'u': 'é你'}",
            b'{\n  "a": 1,\n  "b": [\n    null\n  ],\n  "u": "\\u00e9\\u4f60"\n}',
        ),
    ],
)
def test_results_become_bodies_as_torchserve_makes_them(poison: Service, code: str, body: bytes) -> None:
    assert run(poison, code, GOOD) == [Answer(200, "", [], body), Answer(200, "", [], b"good")]


def test_a_tensor_is_saved(poison: Service) -> None:
    import io

    import torch

    (answer,) = run(poison, "torch.arange(3)")
    assert torch.load(io.BytesIO(answer.body), weights_only=True).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("throw(ValueError('secret'))", 503, "Prediction failed"),
        ("sys.exit(3)", 503, "Prediction failed"),
        ("throw(KeyboardInterrupt())", 503, "Prediction failed"),
        ("throw(GeneratorExit())", 503, "Prediction failed"),
        ("throw(BaseException('base'))", 503, "Prediction failed"),
        ("throw(Evil())", 503, "Prediction failed"),
        ("throw(StopIteration())", 503, "Prediction failed"),
        ("recurse()", 503, "Prediction failed"),
        ("throw(MemoryError())", 507, "Out of resources"),
        ("throw(RuntimeError('CUDA out of memory'))", 507, "Out of resources"),
        ("throw(PredictionException('mine', 513))", 513, "mine"),
        ("throw(PredictionException('mine'))", 500, "mine"),
        ("throw(PredictionException('mine', 'rubbish'))", 500, "mine"),
        ("throw(PredictionException('mine', 99))", 500, "mine"),
        ("throw(PredictionException('mine', 204))", 500, "mine"),
        ("throw(PredictionException('mine', True))", 500, "mine"),
        ("throw(PredictionException('mine', http.HTTPStatus.CONFLICT))", 409, "mine"),
        ("throw(PredictionException('mine', numpy.int64(409)))", 409, "mine"),
        ("Whole(None)", 503, "Invalid model predict output"),
        ("Whole({'not': 'list'})", 503, "Invalid model predict output"),
        ("Whole(('a',) * 4)", 503, "Invalid model predict output"),
        ("Whole(x for x in 'abcd')", 503, "Invalid model predict output"),
        ("Whole([])", 503, "number of batch response mismatched"),
        ("Whole(['a'] * 5)", 503, "number of batch response mismatched"),
        ("object()", 503, "Unsupported model output data type."),
        ("numpy.arange(3)", 503, "Unsupported model output data type."),
        ("{1, 2}", 503, "Unsupported model output data type."),
        ("{(1, 2): 3}", 503, "Unsupported model output data type."),
        ("(x for x in 'a')", 503, "Unsupported model output data type."),
        ("setattr(context, 'request_processor', None) or 'x'", 503, "Prediction failed"),
    ],
)
def test_what_concerns_the_whole_batch_fails_all_of_it(poison: Service, code: str, status: int, message: str) -> None:
    if "request_processor" in code:
        code = "setattr(context, 'request_processor', ()) or 'x'"
    assert run(poison, GOOD, code, GOOD, GOOD) == [Answer(status, "", [], message.encode(), True)] * 4
    assert_alive(poison)


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("circular()", 503, "Unsupported model output data type."),
        ("deep(100_000)", 503, "Unsupported model output data type."),
        (r"'\ud800'", 503, "Unsupported model output data type."),
        ("'x' * 5001", 500, "Response is larger than max_response_size"),
        ("context.set_response_header(row, 'A', 'a\\r\\nB: c') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_header(row, 'A', 'a\\0') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_header(row, 'A', '你') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_header(row, 'A', 'é') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_header(row, 'A', 5) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_header(row, 'A:', 'b') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_header(row, '', 'b') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_header(row, None, 'b') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_content_type(row, 'text\\n') or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(0, idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(99, idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(100, idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(1000, idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status('200', idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(True, idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(204, idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(304, idx=row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(200, 'a\\r\\nb', row) or 'x'", 500, "Invalid response from handler"),
        ("context.set_response_status(200, b'OK', row) or 'x'", 500, "Invalid response from handler"),
    ],
)
def test_what_concerns_one_request_leaves_its_neighbours_alone(
    poison: Service, code: str, status: int, message: str
) -> None:
    good = Answer(200, "", [], b"good")
    expected = [good, Answer(status, "", [], message.encode(), True), good, good]
    assert run(poison, GOOD, code, GOOD, GOOD) == expected
    assert_alive(poison)


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("context.set_response_status(418, idx=row) or 'x'", Answer(418, "", [], b"x")),
        ("context.set_response_status(None, None, row) or 'x'", Answer(200, "", [], b"x")),
        ("context.set_response_status(http.HTTPStatus.GONE, idx=row) or 'x'", Answer(410, "", [], b"x")),
        ("context.set_response_status(numpy.int32(418), idx=row) or 'x'", Answer(418, "", [], b"x")),
        ("context.set_response_status(200, 'Fine', row) or 'x'", Answer(200, "Fine", [], b"x")),
        ("context.set_response_status(204, idx=row) or ''", Answer(204, "", [], b"")),
        ("context.set_response_header(row, 'X-A', 'b') or 'x'", Answer(200, "", [("X-A", "b")], b"x")),
        ("context.set_response_header(row, 'Content-Length', '99') or 'x'", Answer(200, "", [], b"x")),
        (
            "context.set_response_content_type(row, 't/x') or 'x'",
            Answer(200, "", [("content-type", "t/x")], b"x"),
        ),
    ],
)
def test_status_and_headers_reach_the_answer_of_their_row(poison: Service, code: str, answer: Answer) -> None:
    good = Answer(200, "", [], b"good")
    assert run(poison, GOOD, code, GOOD) == [good, answer, good]
    assert run(poison, GOOD, GOOD) == [good, good]


def test_a_handlers_traceback_is_logged_but_not_answered(poison: Service, caplog: pytest.LogCaptureFixture) -> None:
    (answer,) = run(poison, "throw(ValueError('secret'))")
    assert answer.body == b"Prediction failed"
    assert "ValueError: secret" in caplog.text


@pytest.mark.parametrize(
    ("code", "level", "line"),
    [
        ("throw(KeyError())", "WARNING", "Invoking custom service failed."),
        ("throw(PredictionException('mine', 404))", "ERROR", "Prediction error"),
        ("throw(MemoryError())", "ERROR", "System out of memory"),
        ("throw(RuntimeError('CUDA error'))", "ERROR", "CUDA out of memory"),
    ],
)
def test_the_log_names_a_failure_as_torchserve_does(
    poison: Service, caplog: pytest.LogCaptureFixture, code: str, level: str, line: str
) -> None:
    run(poison, code)
    assert (level, line) in [(record.levelname, record.message) for record in caplog.records]


class Gpu:
    """Stands for torch and torch.cuda of a process whose GPU answers as told."""

    def __init__(self, probe: BaseException | None) -> None:
        self.cuda = self
        self.Tensor = bytes
        self.probe = probe

    def is_initialized(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self.probe is not None:
            raise self.probe

    def ones(self, size: int, device: str) -> Any:
        import numpy

        return SimpleNamespace(add_=lambda value: numpy.float32(1 + value))


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    ("probe", "must_restart"),
    [
        (None, False),
        (OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
    ],
)
def test_a_broken_gpu_asks_for_a_new_worker(
    load_model: LoadModel, monkeypatch: pytest.MonkeyPatch, probe: BaseException | None, must_restart: bool
) -> None:
    text = "def handle(data, context):\n    if data: raise RuntimeError('CUDA error: illegal address')\n"
    service = load_model("h.py", {"h.py": text})
    monkeypatch.setitem(sys.modules, "torch", Gpu(probe))
    assert run(service, "") == [Answer(507, "", [], b"Out of resources", True)]
    assert service.must_restart is must_restart


def test_a_list_subclass_is_a_list(load_model: LoadModel) -> None:
    service = load_model(
        "sub.py",
        {"sub.py": "class L(list): pass\ndef handle(data, c):\n    return L(['a'] * len(data or ()))\n"},
    )
    assert [answer.body for answer in run(service, "x", "y")] == [b"a", b"a"]


def test_an_async_handler_is_awaited(load_model: LoadModel) -> None:
    text = (
        "import asyncio\n"
        "class H:\n"
        "    async def handle(self, data, context):\n"
        "        await asyncio.sleep(0)\n"
        "        return [row['body'] for row in data]\n"
    )
    service = load_model("slow.py", {"slow.py": text})
    for _ in range(2):
        assert [answer.body for answer in run(service, b"x", b"y")] == [b"x", b"y"]


def test_chunks_are_sent_and_the_result_is_the_last_one(load_model: LoadModel) -> None:
    chunks: list[Any] = []
    text = (
        "from ts.protocol.otf_message_handler import send_intermediate_predict_response\n"
        "def handle(data, context):\n"
        "    if data is None: return None\n"
        "    context.set_response_status(201, 'Made', 1)\n"
        "    for part in range(2):\n"
        "        send_intermediate_predict_response(\n"
        "            [f'part{part}', {'part': part}], context.request_ids, 'message', 200, context)\n"
        "    send_intermediate_predict_response([None, 'x'], {0: 'id0'}, 'message', 299, context)\n"
        "    return ['end0', 'end1']\n"
    )
    service = load_model("stream.py", {"stream.py": text}, chunks=lambda *chunk: chunks.append(chunk))
    assert run(service, "", "") == [Answer(200, "", [], b"end0"), Answer(201, "Made", [], b"end1")]
    going_on = [("ts_stream_next", "true")]
    assert chunks == [
        (0, 200, "", going_on, b"part0"),
        (1, 201, "Made", going_on, b'{\n  "part": 0\n}'),
        (0, 200, "", going_on, b"part1"),
        (1, 201, "Made", going_on, b'{\n  "part": 1\n}'),
        (0, 299, "", going_on, b"message"),
    ]


def test_a_chunk_goes_to_the_request_that_the_map_names(load_model: LoadModel) -> None:
    sent: list[tuple[int, int, bytes]] = []

    def send_chunk(row: int, status: int, phrase: str, headers: Any, body: bytes) -> None:
        sent.append((row, status, body))
        if body == b"gone":
            raise StreamClosed("gone")

    text = (
        "from ts.handler_utils.utils import send_intermediate_predict_response as send\n"
        "def handle(data, context):\n"
        "    if data is None: return None\n"
        "    first, second = context.request_ids[0], context.request_ids[1]\n"
        "    context.set_response_status(201, 'Made', 0)\n"
        "    send(['for the second'], {0: second}, '', 200, context)\n"
        "    send(['a', 'b'], {0: second, 1: first}, '', 200, context)\n"
        "    send(['a', 'b'], {1: 'of no request'}, '', 200, context)\n"
        "    for part in ('gone', 'not sent'):\n"
        "        send([part], {0: second}, '', 200, context)\n"
        "    send(['for the first'], {0: first}, '', 200, context)\n"
        "    return ['end', 'end']\n"
    )
    service = load_model("stream.py", {"stream.py": text}, chunks=send_chunk)
    assert not any(answer.error for answer in run(service, "", ""))
    assert sent == [
        (1, 201, b"for the second"),
        (1, 201, b"a"),
        (0, 200, b"b"),
        (1, 200, b"b"),
        (1, 201, b"gone"),
        (0, 201, b"for the first"),
    ]


def test_a_client_that_hangs_up_does_not_stop_the_others(load_model: LoadModel) -> None:
    sent: list[tuple[int, bytes]] = []
    gone: set[int] = set()

    def send_chunk(row: int, status: int, phrase: str, headers: Any, body: bytes) -> None:
        sent.append((row, body))
        if row in gone:
            raise StreamClosed("gone")

    text = (
        "from ts.handler_utils.utils import send_intermediate_predict_response as send\n"
        "def handle(data, context):\n"
        "    if data is None: return None\n"
        "    for part in 'ab':\n"
        "        send([part] * len(data), context.request_ids, '', 200, context)\n"
        "    return ['end'] * len(data)\n"
    )
    service = load_model("stream.py", {"stream.py": text}, chunks=send_chunk)
    gone.add(0)
    assert [answer.body for answer in run(service, "", "")] == [b"end", b"end"]
    assert sent == [(0, b"a"), (1, b"a"), (1, b"b")]
    gone.add(1)
    sent.clear()
    assert all(answer.error for answer in run(service, "", ""))
    assert sent == [(0, b"a"), (1, b"a")]
    gone.clear()
    assert not any(answer.error for answer in run(service, "", ""))


@pytest.mark.parametrize(
    ("chunk", "status", "message"),
    [
        ("object()", 503, b"Unsupported model output data type."),
        ("context.set_response_header(0, 'A', '\\n') or 'x'", 500, b"Invalid response from handler"),
    ],
)
def test_a_broken_chunk_fails_the_batch(load_model: LoadModel, chunk: str, status: int, message: bytes) -> None:
    text = (
        "from ts.handler_utils.utils import send_intermediate_predict_response as send\n"
        "def handle(data, context):\n"
        "    if data is not None:\n"
        f"        send([{chunk}], context.request_ids, '', 200, context)\n"
    )
    chunks: list[Any] = []
    service = load_model("stream.py", {"stream.py": text}, chunks=lambda *chunk: chunks.append(chunk))
    assert run(service, "") == [Answer(status, "", [], message, True)]
    assert chunks == []


def test_metrics_are_handed_over_once_per_batch(load_model: LoadModel) -> None:
    batches: list[list[Sample]] = []
    text = (
        "def handle(data, context):\n"
        "    if data is None:\n"
        "        context.metrics.add_counter('loads', 1)\n"
        "        return None\n"
        "    context.metrics.add_counter('rows', len(data), idx=1)\n"
        "    return list('ab')\n"
    )
    service = load_model("metered.py", {"metered.py": text}, sink=batches.append)
    run(service, "", "")
    loaded, served = batches
    model = (("ModelName", "m"), ("Level", "Model"))
    # Loading has an id like a request.
    assert loaded == [Sample("loads", "Count", 1, model, "counter", loaded[0].request_ids)]
    assert uuid.UUID(loaded[0].request_ids)
    assert served[0] == Sample("rows", "Count", 2, model, "counter", "id1")
    name, unit, elapsed_ms, *rest = served[1]
    assert (name, unit, elapsed_ms >= 0) == ("PredictionTime", "Milliseconds", True)
    assert rest == [model, "gauge", "id0,id1"]
    assert run(service, "")[0].error
    assert [sample.name for sample in batches[2]] == ["rows"]


def test_the_models_yaml_reaches_the_context(load_model: LoadModel) -> None:
    text = "def handle(data, context):\n    return [context.model_yaml_config] * len(data or ())\n"
    files = {"h.py": text, "model-config.yaml": "batchSize: 3\nhandler:\n    max_length: 80\n"}
    service = load_model("h.py", files, config_file="model-config.yaml")
    assert json.loads(bytes(run(service, "")[0].body)) == {"batchSize": 3, "handler": {"max_length": 80}}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("RuntimeError('cannot load')", 500, "Unknown exception"),
        ("RuntimeError('CUDA error')", 507, "System out of memory"),
        ("MemoryError()", 507, "System out of memory"),
    ],
)
def test_load_failures_that_torchserve_has_a_status_for(
    load_model: LoadModel, capsys: pytest.CaptureFixture[str], error: str, status: int, message: str
) -> None:
    with pytest.raises(LoadError, match=message) as failure:
        load_model("bad.py", {"bad.py": f"def handle(data, context):\n    raise {error}\n"})
    assert failure.value.status == status
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "Traceback (most recent call last):"
    assert error.split("(", maxsplit=1)[0] in printed[-1]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyError])
def test_other_load_failures_end_the_worker(
    load_model: LoadModel, capsys: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        load_model("bad.py", {"bad.py": f"def handle(data, context):\n    raise {error.__name__}('x')\n"})
    assert error.__name__ in capsys.readouterr().err


def test_a_handler_that_cannot_be_imported_ends_the_worker(load_model: LoadModel) -> None:
    with pytest.raises(ImportError, match="nosuch"):
        load_model("nosuch.py", {})


def test_the_models_folder_comes_first_and_the_shim_second(load_model: LoadModel, tmp_path: Any) -> None:
    load_model("h.py", {"h.py": "def handle(data, context):\n    return data\n"})
    assert sys.path[:2] == [str(tmp_path), shim_path()]


def test_the_service_does_not_import_torch() -> None:
    code = "import sys; from wsgi_ts.handlers.serving import inputs, loader, service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


STOPPING = """
def handle(data, context):
    if data is None:
        return None
    said = {"end": True, "go on": False, "no word": None}
    context.stopping_criteria = [lambda result: said[result]] * len(data)
    return [row["body"] for row in data]
"""


def test_stopping_criteria_say_which_answers_go_on(load_model: LoadModel) -> None:
    service = load_model("h.py", {"h.py": STOPPING})
    answers = service.predict([Request(text, {"body": text}, {}) for text in ("end", "go on", "no word")])
    assert [answer.headers for answer in answers] == [[("ts_stream_next", "false")], [("ts_stream_next", "true")], []]
    (broken,) = service.predict([Request("x", {"body": "unknown"}, {})])
    assert (broken.status, broken.error) == (503, True)
    # A describe request is none of those that the criteria were made for.
    (described,) = service.predict([Request("x", {"body": "unknown"}, {}, is_describe=True)])
    assert (described.body, described.headers) == (b"unknown", [])
