"""`wsgi-ts handler …`, typed by an author of handlers, and what a server records for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.archives import archive
from support.server import ServerProcess
from support.terminal import Terminal

from wsgi_ts.handlers.serving.recording import RecordedRequest, read_recording

#: Says whether each request has a body that it knows; streams, sets a status, and needs all rows to be lists.
HANDLER = """
import json
from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    results = []
    for row, request in enumerate(data):
        body = request["body"]
        if body == "stream":
            send_intermediate_predict_response(["part "], {row: context.request_ids[row]}, "", 200, context)
        if body == "teapot":
            context.set_response_status(418, "Short and stout", idx=row)
        results.append(f"{type(body).__name__} {request.get('q', '')} {context.get_request_header(row, 'X-Tone')}")
    return results
"""
SUM = """
class Sum:
    def initialize(self, context):
        self.add = {add}

    def handle(self, data, context):
        return [sum(row['body']) + self.add for row in data]
"""


@pytest.fixture(scope="module")
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


@pytest.mark.parametrize("kind", ["plain", "base"])
def test_a_new_handler_does_what_its_readme_says(terminal: Terminal, kind: str) -> None:
    written = terminal.type(f"wsgi-ts handler new {kind} --kind {kind}").split()
    assert f"{kind}/handler.py" in written and f"{kind}/test_handler.py" in written
    page = (terminal.home / kind / "README.md").read_text()
    [block] = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    *commands, serve, ask = block.splitlines()
    printed = [terminal.type(f"cd {kind} && {command}") for command in commands]
    runs = {command.split()[2]: text for command, text in zip(commands, printed, strict=True) if " handler " in command}
    assert runs["run"].split() == (
        ["[0]", "200", "6", "[1]", "200", "4"] if kind == "plain" else ["[0]", "200", "3.0", "[1]", "200", "1.0"]
    )
    assert runs["test"].startswith("OK ") and "FAIL" not in runs["test"]
    terminal.configure()
    serve = serve.replace("serve", "serve --ts-config ../config.properties")
    terminal.start_server(f"cd {kind} && {serve} >> ../terminal.log 2>&1 &")
    terminal.wait_for_workers("my_model")
    assert float(terminal.type(ask)) == (6 if kind == "plain" else 3.0)
    terminal.type("wsgi-ts stop")
    terminal.wait_for_end()


def test_new_keeps_what_is_there(terminal: Terminal) -> None:
    path = terminal.write("kept/handler.py", "mine")
    terminal.type("wsgi-ts handler new kept", status=1)
    assert path.read_text() == "mine"
    assert [each.name for each in path.parent.iterdir()] == ["handler.py"]


def test_run_shows_what_a_client_would_get(terminal: Terminal) -> None:
    terminal.write("shown/handler.py", HANDLER)
    (terminal.home / "shown" / "raw.bin").write_bytes(b"\xff")
    printed = terminal.type(
        "cd shown && printf stream > a.txt && printf teapot > b.txt &&"
        " wsgi-ts handler run handler.py -i a.txt -i b.txt -i raw.bin -d '{\"a\": 1}' -H 'X-Tone: mild'"
    )
    assert printed.splitlines() == [
        "[0] 200",
        "part str  mild",
        "[1] 418 Short and stout",
        "str  mild",
        "[2] 200",
        "bytearray  mild",
        "[3] 200",
        "dict  mild",
    ]


def test_run_opens_archives(terminal: Terminal) -> None:
    archive(terminal.home, "sum", SUM.format(add=1))
    assert terminal.type("wsgi-ts handler run sum.mar -d '[1, 2]'").splitlines() == ["[0] 200", "4"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run nothing.mar -d 1", "nothing.mar"),
        ("run shown/handler.py", "name at least one --input FILE or --data JSON"),
        ("run shown/handler.py -d 1 -H nonsense", "--header 'nonsense': write it as 'Name: value'"),
        ("run shown/handler.py -d 1 --serialized-file none.pt", "none.pt: there is no such file (serializedFile)"),
        ("run broken/handler.py -d 1", "broken/handler.py: the handler could not be loaded: ZeroDivisionError"),
        ("replay shown/handler.py broken/handler.py", "broken/handler.py:1: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(terminal: Terminal, command: str, told: str) -> None:
    terminal.write("shown/handler.py", HANDLER)
    terminal.write("broken/handler.py", "1 / 0\n")
    before = len(terminal.output())
    terminal.type(f"wsgi-ts handler {command}", status=1)
    assert told in terminal.output()[before:].splitlines()[-1]


def test_test_finds_faults(terminal: Terminal) -> None:
    terminal.write("one/handler.py", "def handle(data, context):\n    return data and [data[0]['body']]\n")
    printed = terminal.type("wsgi-ts handler test one/handler.py -d '[1]'", status=1)
    assert re.search(r"^FAIL +a batch of 2 is answered 503: number of batch response mismatched", printed, re.MULTILINE)
    terminal.write("all/handler.py", SUM.format(add=0))
    printed = terminal.type("""wsgi-ts handler test all/handler.py -d '["a"]'""", status=1)
    assert re.search(r"^FAIL +sample 1 alone: 503", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two requests of three, recorded by a server."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "requests.jsonl"
    config = f"handler:\n  record: {{file: {path}, requests: 2}}\n"
    archive(folder, "sum", SUM.format(add=0), config_yaml=f"minWorkers: 1\nmaxWorkers: 1\n{config}")
    with ServerProcess(store=folder, config={"load_models": "sum.mar"}) as server:
        for text in ("[1, 2]", "[3]", "[4]"):
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret", "X-Tone": "mild"}
            assert server.request("inference", "POST", "/predictions/sum", body=text, headers=headers).status == 200
    return path


def test_a_server_records_requests_and_answers(recorded: Path) -> None:
    first, second = read_recording(recorded)
    assert (first.body, first.status, first.answer) == (b"[1, 2]", 200, b"3")
    assert (second.body, second.answer) == (b"[3]", b"3")
    assert first.request == "POST /predictions/sum HTTP/1.1"
    assert first.content_type == "application/json"
    assert first.headers["X-Tone"] == "mild"
    assert "secret" not in recorded.read_text()


def test_of_streamed_answers_nothing_is_recorded_but_the_request(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    config = f"minWorkers: 1\nmaxWorkers: 1\nhandler:\n  record: {{file: {path}}}\n"
    archive(tmp_path, "parts", HANDLER, config_yaml=config)
    with ServerProcess(store=tmp_path, config={"load_models": "parts.mar"}) as server:
        for text in ("stream", "whole"):
            headers = {"Content-Type": "text/plain"}
            assert server.request("inference", "POST", "/predictions/parts", body=text, headers=headers).status == 200
    streamed, whole = read_recording(path)
    assert (streamed.body, streamed.status) == (b"stream", None)
    assert (whole.body, whole.status) == (b"whole", 200)


def test_no_environment_is_made_for_a_handler_that_is_run_here(terminal: Terminal) -> None:
    path = terminal.write("own/handler.py", SUM.format(add=0))
    terminal.write("own/model-config.yaml", "useVenv: true\n")
    cache = terminal.home / "cache"
    printed = terminal.type(f"XDG_CACHE_HOME={cache} wsgi-ts handler run {path} -d '[1, 2]'")
    assert printed.splitlines() == ["[0] 200", "3"]
    assert not cache.exists()


def test_replay_compares_answers(terminal: Terminal, recorded: Path) -> None:
    same = terminal.write("same/handler.py", SUM.format(add=0))
    assert "2 of 2 answers are the same" in terminal.type(f"wsgi-ts handler replay {same} {recorded} --batch 2")
    other = terminal.write("other/handler.py", SUM.format(add=1))
    printed = terminal.type(f"wsgi-ts handler replay {other} {recorded}", status=1)
    assert "FAIL  request 1: 200 '4', then 200 '3'" in printed
    assert "0 of 2 answers are the same" in printed


def test_lines_are_written_as_they_are_read() -> None:
    head = b"PUT /predictions/m?q=%20a HTTP/1.1\r\nA: b\r\nCookie: c\r\n\r\n"
    request = RecordedRequest.from_head(head, b"\xff", 418, b"text")
    assert RecordedRequest.from_line(request.to_line()) == request
    assert request.head == b"PUT /predictions/m?q=%20a HTTP/1.1\r\nA: b\r\n"
    assert request.query == "q=%20a"
    assert RecordedRequest.from_line('{"body": [1, 2]}').body == b"[1, 2]"
    assert json.loads(RecordedRequest(body=b"a").to_line()) == {
        "request": "POST /predictions/model HTTP/1.1",
        "headers": {},
        "body": "a",
    }
