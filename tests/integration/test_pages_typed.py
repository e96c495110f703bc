"""Pages of docs/ whose every command and snippet is run as it is printed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from support.eventually import eventually
from support.log4j2 import LOG4J2
from support.pages import Page, commands
from support.terminal import Terminal

from wsgi_ts.models.model_yaml import parse_model_yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("curl") is None, reason="the pages' commands need curl"),
]


def type_all(terminal: Terminal, block: str, *models: str) -> list[str]:
    """Types the commands of a block; a server that they start has to serve `models` then.

    Returns what each of the others prints.
    """
    printed = []
    for command in commands(block):
        if command.startswith("torchserve --start"):
            terminal.start_server(command)
            for model in models:
                terminal.wait_for_workers(model)
        else:
            printed.append(terminal.type(command))
    return printed


def check_model_config(text: str) -> None:
    """A model-config.yaml that the server takes as it stands."""
    assert parse_model_yaml(yaml.safe_load(text)).warnings == ()


def test_batching() -> None:
    page = Page("batching.md")
    with Terminal() as terminal:
        terminal.configure(preload_modules="")
        check_model_config(page.next("yaml", "maxBatchDelay"))
        check_model_config(page.next("yaml", "useJobTicket"))
        terminal.write("model-config.yaml", page.next("yaml", "continuousBatching"))
        terminal.write("countdown.py", page.next("python", "class Countdown"))
        printed = type_all(terminal, page.next("bash", "countdown"), "countdown")
        assert printed[-1] == page.next("", "3\n")
        terminal.write("model-config.yaml", page.next("yaml", "sequenceBatching"))
        terminal.write("adder.py", page.next("python", "class Adder"))
        *_, first, second = type_all(terminal, page.next("bash", "adder"))
        assert json.loads(first)["sum"] == 5
        assert second.strip() == page.next("", '"sum": 12').strip()
        snippet = page.next("python", "header_key_sequence_end")
        terminal.write("snippet.py", f"{SHOWN_CONTEXT}{snippet}print(context.get_response_headers(0))\n")
        assert terminal.type("python snippet.py") == "{'ts_request_sequence_end': 's1;s2'}\n"
    page.end()


#: The page's `context`, of a batch of one.
SHOWN_CONTEXT = """
from wsgi_ts.handlers.testing import MockContext
from wsgi_ts.handlers.serving.context import RequestProcessor

context = MockContext()
context.request_processor = [RequestProcessor({})]
"""


def test_handlers() -> None:
    page = Page("handlers.md")
    with Terminal() as terminal:
        terminal.configure()
        terminal.write("upper.py", page.next("python", "upper()"))
        printed = type_all(terminal, page.next("bash", "upper.mar"), "upper")
        assert printed[-1] == page.next("").strip()
        terminal.write("doubler.py", page.next("python", "class Doubler"))
        assert "[\n  2,\n  4\n]" in terminal.type("wsgi-ts handler run doubler.py -d '[1, 2]'")
        terminal.write("raises.py", page.next("python", "PredictionException"))
        terminal.type("python raises.py", status=1)
        assert "The image is too small." in terminal.output()
        classifier = page.next("python", "class Classifier")
        terminal.write("model/classifier.py", classifier)
        terminal.write("make.py", MAKES_MODELS)
        terminal.type("python make.py")
        run = "wsgi-ts handler run model/classifier.py --model-file model.py --serialized-file weights.pt"
        assert "\n1\n" in terminal.type(f"{run} -d '[0.0, 1.0]'")
        terminal.write("model/model-config.yaml", page.next("yaml", "backend: inductor"))
        assert "\n1\n" in terminal.type(f"{run} -d '[0.0, 1.0]'")
        assert "Compiled model with backend inductor, mode reduce-overhead" in terminal.output()
        _squeezenet(terminal, page)
        _streams_and_pieces(terminal, page)
        for holding in ("maxExecutions", "warm_up"):
            check_model_config(page.next("yaml", holding))
        terminal.configure(page.next("properties", "preload_modules"))
        terminal.type("wsgi-ts doctor --model-store model_store")
        _without_a_server(terminal, page, classifier)
    page.end()


#: A model that answers with what it is asked, and one that looks at the mean of each colour.
MAKES_MODELS = """
import json
import torch
from pathlib import Path
from PIL import Image

Path("model").mkdir(exist_ok=True)
Path("model/model.py").write_text(
    "import torch\\n\\n\\nclass Same(torch.nn.Linear):\\n    def __init__(self):\\n        super().__init__(2, 2)\\n"
)
torch.save({"weight": torch.eye(2), "bias": torch.zeros(2)}, "model/weights.pt")
Path("model.py").write_text(
    "import torch\\n\\n\\nclass Means(torch.nn.Linear):\\n"
    "    def __init__(self):\\n        super().__init__(3, 1000)\\n\\n"
    "    def forward(self, images):\\n        return super().forward(images.mean(dim=(2, 3)))\\n"
)
torch.save({"weight": torch.randn(1000, 3), "bias": torch.zeros(1000)}, "squeezenet.pth")
Path("index_to_name.json").write_text(json.dumps({str(number): f"class {number}" for number in range(1000)}))
Image.new("RGB", (256, 256), (200, 120, 40)).save("kitten.jpg")
"""


def _squeezenet(terminal: Terminal, page: Page) -> None:
    """A bundled handler, asked and explained."""
    type_all(terminal, page.next("bash", "image_classifier"))
    assert len(json.loads(type_all(terminal, page.next("bash", "kitten.jpg"))[-1])) == 5
    check_model_config(page.next("yaml", "dali"))
    explained = json.loads(type_all(terminal, page.next("bash", "explanations"))[-1])
    assert len(explained) == 3 and len(explained[0]) == 224


def _streams_and_pieces(terminal: Terminal, page: Page) -> None:
    terminal.write("streams.py", page.next("python", "def handle"))
    assert "one two three" in terminal.type("wsgi-ts handler run streams.py -d '1'")
    snippet = page.next("python", "TextIteratorStreamerBatch").replace("\n", "\n        ")
    terminal.write("four_words.py", FOUR_WORDS)
    terminal.write("generates.py", GENERATES + snippet)
    assert "once upon a time" in terminal.type("wsgi-ts handler run generates.py -d '1'")
    terminal.write("pieces.py", page.next("python", "MicroBatching"))
    files = "--model-file model.py --serialized-file squeezenet.pth"
    printed = terminal.type(f"wsgi-ts handler run pieces.py {files} {'-i kitten.jpg ' * 6}")
    assert printed.count("class ") == 6 * 5


#: A model that generates four words.
FOUR_WORDS = """
class Tokenizer:
    words = ["", "once ", "upon ", "a ", "time "]

    def decode(self, tokens, **options):
        return "".join(self.words[int(token)] for token in tokens)


class Model:
    def generate(self, input_ids, streamer):
        import torch

        streamer.put(input_ids)
        for token in (1, 2, 3, 4):
            streamer.put(torch.tensor([token] * len(input_ids)))
        streamer.end()
"""

#: A handler around the page's lines.
GENERATES = """
import four_words
from ts.handler_utils.utils import send_intermediate_predict_response


class Handler:
    def initialize(self, context):
        self.tokenizer, self.model = four_words.Tokenizer(), four_words.Model()

    def handle(self, data, context):
        import torch

        inputs = {"input_ids": torch.zeros((len(data), 1), dtype=torch.long)}
        """


def _without_a_server(terminal: Terminal, page: Page, classifier: str) -> None:
    printed = terminal.type(page.next("bash", "handler new"))
    assert "3.0" in printed and "alone" in printed
    check_model_config(page.next("yaml", "record"))
    terminal.write("my_model/test_page.py", page.next("python", "def test_each"))
    assert " passed" in terminal.type("cd my_model && python -m pytest -p no:cacheprovider")
    terminal.write("apart/stand_in.py", classifier + page.next("python", "MockContext"))
    terminal.type("mv model apart && cd apart && python stand_in.py")
    assert " passed" in terminal.type(f"cd my_model && {page.next('bash', 'ts_path')}")


LOUD = """
import logging
import sys


def handle(data, context):
    print("said by the handler")
    print("a complaint", file=sys.stderr)
    return data and [row["body"] for row in data]
"""


def test_logging() -> None:
    page = Page("logging.md")
    with Terminal() as terminal:
        terminal.configure(preload_modules="", load_models="loud.mar", enable_model_api="true")
        terminal.write("loud.py", LOUD)
        (terminal.home / "model_store").mkdir()
        terminal.type("torch-model-archiver --model-name loud -v 1.0 --handler loud.py --export-path model_store")
        log = f"{terminal.home}/log"
        start, follow = commands(page.next("bash", "LOG_LOCATION").replace("/var/log/ts", log))
        terminal.start_server(start)
        terminal.wait_for_workers("loud")
        assert _said(terminal, "loud") == "x"
        assert "Model server started" in terminal.type(f"timeout 1 {follow} -n +1", status=124)
        shown, access = page.next("", "MODEL_LOG").splitlines()
        lines = Path(log, "model_log.log").read_text().splitlines()
        assert any(_shape(line) == _shape(shown) for line in lines if "said by" in line), lines
        assert _shape(Path(log, "access_log.log").read_text().splitlines()[-1]) == _shape(access)
        _with_log_config(terminal, page)
        _log4j2_and_slow_disks(terminal, page)
    page.end()


def _shape(line: str) -> str:
    """A line of a log without times, names and numbers."""
    line = re.sub(r"MODEL_LOG - .*", "MODEL_LOG - TEXT", line)
    return re.sub(
        r"mnist|loud", "NAME", re.sub(r"\d+", "N", line.replace("GET /models/loud", "POST /predictions/loud"))
    )


def _said(terminal: Terminal, model: str) -> str:
    return terminal.type(f"curl -sS -H 'Content-Type: text/plain' -d x http://127.0.0.1:8080/predictions/{model}")


def _restart(terminal: Terminal, command: str) -> None:
    terminal.type("torchserve --stop")
    terminal.wait_for_end()
    terminal.start_server(command)
    terminal.wait_for_workers("loud")
    assert _said(terminal, "loud") == "x"


def _with_log_config(terminal: Terminal, page: Page) -> None:
    terminal.write("logging.yaml", page.next("yaml", "# logging.yaml"))
    [start] = commands(page.next("bash", "--log-config logging.yaml"))
    _restart(terminal, start)
    [command] = re.findall(r"kill -USR1 .*", page.next("", "postrotate"))
    moved, log = terminal.home / "moved.log", terminal.home / "logs" / "ts_log.log"
    log.rename(moved)
    terminal.type(command.replace("/tmp/", f"{terminal.home}/tmp/"))
    eventually(log.exists, within=10, what="a new ts_log.log")

    terminal.write("quiet.yaml", page.next("yaml", "# quiet.yaml"))
    printed = len(terminal.output())
    _restart_quietly(terminal, start.replace("logging.yaml", "quiet.yaml"))
    assert "Model server started" in (terminal.home / "logs" / "server.log").read_text()
    assert "said by" not in (terminal.home / "logs" / "model_log.log").read_text().rpartition("started")[2]
    assert "INFO" not in terminal.output()[printed:]
    terminal.write("quiet.yaml", page.next("yaml", "propagate: true"))
    before = terminal.output().count('"POST /predictions/loud HTTP/1.1" 200')
    _restart(terminal, start.replace("logging.yaml", "quiet.yaml"))
    wanted = before + 1
    eventually(
        lambda: terminal.output().count('"POST /predictions/loud HTTP/1.1" 200') >= wanted,
        within=10,
        what="the access line on stdout",
    )


def _restart_quietly(terminal: Terminal, command: str) -> None:
    """Restarts a server that says nothing on stdout."""
    terminal.type("torchserve --stop")
    terminal.wait_for_end()
    terminal.type(command)
    eventually(lambda: _said(terminal, "loud") == "x", within=60, what="the model")


def _log4j2_and_slow_disks(terminal: Terminal, page: Page) -> None:
    terminal.write("log4j2.xml", LOG4J2)
    keys = page.next("properties", "log4j.configurationFile").replace("/etc/ts", str(terminal.home))
    keys += page.next("properties", "async_logging")
    terminal.configure(preload_modules="", load_models="loud.mar", enable_model_api="true")
    file = terminal.home / "config.properties"
    file.write_text(file.read_text() + keys)
    _restart(terminal, "torchserve --start --ncs --model-store model_store")
    requests = terminal.home / "logs" / "requests.log"
    eventually(lambda: requests.exists() and "access:" in requests.read_text(), within=10, what="the access log")
