"""`wsgi-ts workflow run`: one request through a workflow, without a server."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive

from wsgi_ts.workflows.run import main

#: Adds its letter, and says which other files of its folder it sees.
LETTER = """
import word
def handle(data, context):
    if data is None:
        return None
    from lazily import SUFFIX
    return [bytes(row.get("body", b"")) + word.WORD + SUFFIX + bytes([48 + len(data)]) for row in data]
"""


def model(store: Path, name: str, word: bytes, source: str = LETTER, **more: Any) -> None:
    files = {"word.py": f"WORD = {word!r}\n", "lazily.py": f"SUFFIX = {word.lower()!r}\n"}
    archive(store, name, source, files=files, **more)


class Runner:
    """Runs workflows that it writes, in one folder."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._capfd = capfd
        self._monkeypatch = monkeypatch
        self.errors = ""

    def __call__(self, spec: str, functions: str, body: bytes = b"", *flags: str, status: int = 0) -> bytes:
        (self.folder / "flow.yaml").write_text(spec)
        (self.folder / "flow.py").write_text(functions)
        stdin = io.TextIOWrapper(io.BytesIO(body))
        self._monkeypatch.setattr(sys, "stdin", stdin)
        path, modules = list(sys.path), set(sys.modules)
        assert main([str(self.folder / "flow.yaml"), "--handler", str(self.folder / "flow.py"), *flags]) == status
        assert sys.path == path
        assert not {"flow", "word", "lazily", "handler"} & (set(sys.modules) - modules)
        out, self.errors = self._capfd.readouterr()
        return out.encode()


@pytest.fixture(autouse=True)
def _the_log_stays_as_it_is() -> Iterator[None]:
    """The command sets up logging to a stream that ends with its test."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tmp_path, capfd, monkeypatch)


ECHO = "def {}(data, context):\n    return [bytes(data[0]['body'])] if data else None\n"


def test_models_and_functions_in_a_row(run: Runner) -> None:
    model(run.folder, "one", b"A")
    model(run.folder, "two", b"B")
    spec = "models: {one: {url: one.mar}, two: {url: two.mar}}\ndag: {before: [one], one: [two], two: [after]}"
    assert run(spec, ECHO.format("before") + ECHO.format("after"), b"x") == b"xAa1Bb1"
    assert run.errors == ""


def test_what_a_node_is_given(run: Runner) -> None:
    functions = """
def start(data, context):
    assert isinstance(data, list) or data is None
    return [{"got": data[0]["body"], "type": context.get_request_header(0, "Content-Type"),
             "tag": context.get_request_header(0, "X-Tag"), "name": context.model_name}] if data else None
def left(data, context):
    return [{"type": type(data[0]["body"]).__name__, "n": len(data)}] if data else None
def right(data, context):
    return ["text"] if data else None
def join(data, context):
    return [[sorted(data[0]), bytes(data[0]["start"]).decode(), bytes(data[0]["left"]).decode(),
             bytes(data[0]["right"]).decode(), context.manifest]] if data else None
"""
    spec = "models: {}\ndag: {start: [left, right, join], left: [join], right: [join]}"
    flags = ["--content-type", "application/json", "--header", "X-Tag: blue"]
    keys, start, left, right, manifest = json.loads(run(spec, functions, b'{"a": [1]}', *flags))
    assert keys == ["left", "right", "start"]
    assert json.loads(start) == {"got": {"a": [1]}, "type": "application/json", "tag": "blue", "name": "flow__start"}
    assert start.startswith('{\n  "got": {')
    assert json.loads(left) == {"type": "bytearray", "n": 1}
    assert (right, manifest) == ("text", None)


def test_a_form_and_what_is_passed_on(run: Runner) -> None:
    functions = ECHO.replace("'body'", "'a'").format("start") + (
        "def end(data, context):\n"
        "    return [[sorted(data[0]), bytes(data[0]['request.b']).decode()]] if data else None\n"
    )
    spec = "models: {}\ndag: {start: [end]}\noptions: {nodes: {end: {pass: [request]}}}"
    answer = run(spec, functions, b"a=1&b=2", "--content-type", "application/x-www-form-urlencoded")
    assert json.loads(answer) == [["body", "request.a", "request.b"], "2"]


def test_several_leaves_are_put_together(run: Runner) -> None:
    functions = ECHO.format("s") + "def a(data, context): return [{'x': 'ü'}]\ndef b(data, context): return [{}]\n"
    spec = "models: {}\ndag: {s: [b, a]}"
    assert run(spec, functions).decode() == '{\n  "b": {},\n  "a": {\n    "x": "ü"\n  }\n}\n'
    run(spec, functions.replace("[{}]", "['abc']"), status=1)
    assert run.errors == 'the leaves cannot be put together, each has to be a JSON object: "abc"\n'


def test_the_items_of_a_list_fill_batches_and_come_back_in_order(run: Runner) -> None:
    model(run.folder, "m", b"")
    functions = """
def split(data, context):
    return [bytes(data[0]["body"]).decode().split()] if data else None
def join(data, context):
    return [" ".join(bytes(item).decode() for item in data[0]["body"])] if data else None
"""
    spec = (
        "models: {m: {url: m.mar, batch-size: 3}}\ndag: {split: [m], m: [join]}\n"
        "options: {nodes: {split: {scatter: true}, join: {gather: true}}}"
    )
    assert run(spec, functions, b"a b c d", "--trace") == b"a3 b3 c3 d1"
    assert "m: 3 items, " in run.errors and "join: ran, " in run.errors
    assert run(spec, functions, b"") == b""
    run(spec, functions.replace(".decode().split()]", "]"), b"a", status=1)
    assert run.errors.endswith("Error executing split\n")


def test_conditions_and_defaults(run: Runner) -> None:
    functions = (
        ECHO.format("s")
        + ECHO.format("dog")
        + "def is_dog(data, context):\n    return [data[0]['body'] == b'dog'] if data else None\n"
        + "def end(data, context):\n    return [','.join(sorted(data[0]))] if data else None\n"
        + "def fails(data, context):\n    return [1 // len(data) // 0] if data else None\n"
    )
    spec = "models: {}\ndag: {s: [dog, end], dog: [end]}\noptions: {nodes: {dog: {when: is_dog}}}"
    assert run(spec, functions, b"dog") == b"dog,s"
    assert run(spec, functions, b"cat") == b"s"
    early_end = "models: {}\ndag: {s: [dog], dog: [end]}\noptions: {nodes: {dog: {when: is_dog}}}"
    assert run(early_end, functions, b"cat") == b"cat"
    failing = "models: {}\ndag: {s: [fails], fails: [dog]}\noptions: {nodes: {fails: {on-error: %s}}}"
    assert run(failing % "default, default: {a: 1}", functions, b"x") == b'{\n  "a": 1\n}'
    assert "ZeroDivisionError" in run.errors
    assert run(failing % "skip", functions, b"x") == b"x"
    run(failing % "fail", functions, b"x", status=1)
    assert run.errors.endswith("fails: 503 Prediction failed\nError executing fails\n")


def test_a_stream_and_an_async_model(run: Runner) -> None:
    source = """
from ts.protocol.otf_message_handler import send_intermediate_predict_response
def handle(data, context):
    if data is None:
        return None
    for word in (b"a", b"b"):
        send_intermediate_predict_response([word], context.request_ids, "ok", 200, context)
    return [b"c"]
"""
    archive(run.folder, "s", source)
    spec = "models: {s: {url: s.mar}}\ndag: {before: [s]}"
    assert run(spec, ECHO.format("before")) == b"abc"
    assert (
        run("models: {s: {url: s.mar}}\ndag: {before: [s], s: [after]}", ECHO.format("before") + ECHO.format("after"))
        == b"a"
    )
    source = "async def handle(data, context):\n    return None if data is None else [b'later']\n"
    archive(
        run.folder,
        "s",
        source,
        config_yaml="asyncCommunication: true",
        manifest_overrides={"handler": "handler.py:handle"},
    )
    assert run(spec, ECHO.format("before")) == b"later"


def test_a_shared_model_is_found_by_its_name(run: Runner) -> None:
    (run.folder / "store").mkdir()
    model(run.folder / "store", "minilm", b"M")
    spec = "models: {}\ndag: {s: [e]}\noptions: {nodes: {e: {model: minilm/2.0}}}"
    assert run(spec, ECHO.format("s"), b"x", "--model-store", str(run.folder / "store")) == b"xMm1"


def test_an_archive_reads_its_input_from_a_file(run: Runner) -> None:
    from wsgi_ts.archiver import WorkflowArchiveRequest, create_workflow_archive

    (run.folder / "flow.yaml").write_text("models: {}\ndag: {s: []}")
    (run.folder / "flow.py").write_text(
        "def s(data, context):\n    return [open(context.system_properties['model_dir'] + '/labels.txt').read()]\n"
    )
    (run.folder / "labels.txt").write_text("cat")
    files = [str(run.folder / name) for name in ("flow.yaml", "flow.py", "labels.txt")]
    war = create_workflow_archive(WorkflowArchiveRequest("flow", *files, export_path=str(run.folder)))
    (run.folder / "input").write_bytes(b"x")
    command = [sys.executable, "-c", "from wsgi_ts.cli.commands import wsgi_ts; wsgi_ts()", "workflow", "run"]
    done = subprocess.run([*command, war, run.folder / "input"], capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"cat", b"")


@pytest.mark.parametrize(
    ("spec", "functions", "message"),
    [
        ("models: {}\ndag: {s: [s]}", "", "flow: Self loop exception"),
        (
            "models: {m: {url: none.mar}}\ndag: {s: [m]}",
            ECHO.format("s"),
            "m: Model not found at: none.mar (model store: ",
        ),
        ("models: {m: {}}\ndag: {s: [m]}", ECHO.format("s"), "flow: flow.yaml:1: key models.m: the node m has no url"),
        ("models: {}\ndag: {s: []}", "raise SystemExit(3)", "s cannot be loaded: SystemExit: 3"),
        (
            "models: {}\ndag: {s: []}",
            "import absent_module",
            "s cannot be loaded: ModuleNotFoundError: No module named",
        ),
        ("models: {}\ndag: {s: []}", "", "s cannot be loaded: ValueError: Expected only one class"),
    ],
)
def test_what_cannot_be_run(run: Runner, spec: str, functions: str, message: str) -> None:
    run(spec, functions, status=1)
    assert run.errors.splitlines()[-1].startswith(message)


def test_an_optional_model_that_cannot_be_loaded_is_skipped(run: Runner) -> None:
    spec = "models: {m: {url: none.mar}}\ndag: {s: [m]}\noptions: {nodes: {m: {optional: true}}}"
    assert run(spec, ECHO.format("s"), b"x") == b"x"
    assert run.errors.endswith("the node is optional, and skipped\n")


@pytest.mark.parametrize("config", ["parallelType: tp\ntorchrun:\n  nproc-per-node: 2\n", "continuousBatching: true\n"])
def test_models_that_need_a_server(run: Runner, config: str) -> None:
    model(run.folder, "m", b"M", config_yaml=config)
    run("models: {m: {url: m.mar}}\ndag: {s: [m]}", ECHO.format("s"), status=1)
    assert run.errors == "m: a model of several processes, or of sequences, needs a server\n"


def test_wrong_input(run: Runner) -> None:
    spec = "models: {}\ndag: {s: []}"
    run(spec, ECHO.format("s"), b"", "-H", "nothing", status=1)
    assert run.errors == "'nothing' is no header: write NAME:VALUE\n"
    run(spec, ECHO.format("s"), b"x", "--content-type", "multipart/form-data", status=1)
    assert run.errors.startswith("Malformed multipart body")
    assert main([str(run.folder / "flow.yaml"), str(run.folder / "none")]) == 1
    assert main([str(run.folder / "none.war"), os.devnull]) == 1
    assert main([str(run.folder / "flow.yaml"), os.devnull]) == 1
