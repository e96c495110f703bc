"""Pages of docs/ whose every command and snippet is run as it is printed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from support.archives import archive
from support.authority import Authority
from support.eventually import eventually
from support.log4j2 import LOG4J2
from support.pages import Page, commands
from support.server import REPOSITORY
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
        terminal.configure(
            preload_modules="", load_models="loud.mar", enable_model_api="true", disable_token_authorization="true"
        )
        terminal.write("loud.py", LOUD)
        (terminal.home / "model_store").mkdir()
        terminal.type("torch-model-archiver --model-name loud -v 1.0 --handler loud.py --export-path model_store")
        log = f"{terminal.home}/log"
        start, follow = commands(page.next("bash", "LOG_LOCATION").replace("/var/log/ts", log))
        terminal.start_server(f"{start} >> terminal.log 2>&1")
        terminal.wait_for_workers("loud")
        assert _said(terminal, "loud") == "x"
        # On a busy machine a second may end before the file is read.
        eventually(lambda: "Model server started" in terminal.type(f"timeout 1 {follow} -n +1", status=124), within=20)
        shown, access = page.next("", "MODEL_LOG").splitlines()

        def said() -> list[str]:
            return [line for line in Path(log, "model_log.log").read_text().splitlines() if "said by" in line]

        eventually(lambda: any(_shape(line) == _shape(shown) for line in said()), within=20, what="the handler's line")
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
    eventually(log.exists, within=20, what="a new ts_log.log")

    terminal.write("quiet.yaml", page.next("yaml", "# quiet.yaml"))
    terminal.type("torchserve --stop")
    terminal.wait_for_end()
    said = terminal.home / "logs" / "model_log.log"
    said.unlink()
    printed = len(terminal.output())
    terminal.type(start.replace("logging.yaml", "quiet.yaml"))
    server_log = terminal.home / "logs" / "server.log"
    eventually(
        lambda: server_log.exists() and "Model server started" in server_log.read_text(), within=60, what="the start"
    )
    terminal.wait_for_workers("loud")
    assert _said(terminal, "loud") == "x"
    eventually(lambda: "a complaint" in said.read_text(), within=20, what="what the handler says on stderr")
    assert "said by" not in said.read_text()
    assert "[INFO" not in terminal.output()[printed:]
    terminal.write("quiet.yaml", page.next("yaml", "propagate: true"))
    before = terminal.output().count('"POST /predictions/loud HTTP/1.1" 200')
    _restart(terminal, start.replace("logging.yaml", "quiet.yaml"))
    wanted = before + 1
    eventually(
        lambda: terminal.output().count('"POST /predictions/loud HTTP/1.1" 200') >= wanted,
        within=20,
        what="the access line on stdout",
    )


def _log4j2_and_slow_disks(terminal: Terminal, page: Page) -> None:
    terminal.write("log4j2.xml", LOG4J2)
    keys = page.next("properties", "log4j.configurationFile").replace("/etc/ts", str(terminal.home))
    keys += page.next("properties", "async_logging")
    terminal.configure(
        preload_modules="", load_models="loud.mar", enable_model_api="true", disable_token_authorization="true"
    )
    file = terminal.home / "config.properties"
    file.write_text(file.read_text() + keys)
    _restart(terminal, "torchserve --start --ncs --model-store model_store")
    requests = terminal.home / "logs" / "requests.log"
    eventually(lambda: requests.exists() and "access:" in requests.read_text(), within=20, what="the access log")


def test_console() -> None:
    page = Page("console.md")
    with Terminal() as terminal:
        terminal.configure(preload_modules="", load_models="echo.mar")
        archive(terminal.home, "echo")
        terminal.start_server("torchserve --start --ncs --model-store .")
        terminal.wait_for_workers("echo")
        address = page.next("").strip()
        assert "<title>wsgi-ts console</title>" in terminal.type(f"curl -sS {address}")
        # Where it leads nobody knows here; that ssh takes it can be said.
        tunnel = page.next("bash", "ssh -L").strip()
        if shutil.which("ssh"):
            assert "localforward" in terminal.type(tunnel.replace("ssh ", "ssh -G ")).lower()
        [events] = commands(page.next("bash", "/console/events"))
        eventually(lambda: "event: snapshot" in terminal.type(f"timeout 2 {events}", status=124), within=20)
    page.end()


def test_llm() -> None:
    """Over stand-ins for the engines, without a GPU."""
    page = Page("llm.md")
    with Terminal() as terminal:
        terminal.export("PYTHONPATH", f"$PYTHONPATH:{REPOSITORY / 'tests' / 'support' / 'engines'}")
        terminal.configure(enable_model_api="true", disable_token_authorization="true")
        [start] = commands(page.next("bash", "wsgi-ts llm"))
        terminal.start_server(f"{start} >> terminal.log 2>&1 &")
        terminal.wait_for_workers("model")
        chat = type_all(terminal, page.next("bash", "chat/completions"))[-1]
        assert chat.endswith("data: [DONE]\n\n") and chat.count("data: ") == 21
        terminal.type("torchserve --stop")
        terminal.wait_for_end()

        config = page.next("yaml", "tensor_parallel_size")
        check_model_config(config)
        terminal.write("model-config.yaml", config)
        type_all(terminal, page.next("bash", "vllm_handler"), "llm")
        ask = "curl -sS http://localhost:8080/predictions/llm/1.0/v1/models"
        assert '"meta-llama/Llama-3.2-3B-Instruct"' in terminal.type(ask)
        check_model_config(page.next("yaml", "adapters"))

        terminal.write("model-config.yaml", page.next("yaml", "engine_dir"))
        for folder in ("engine", "tokenizer"):
            terminal.write(f"{folder}/config.json", "{}")
        pack = "torch-model-archiver -v 1.0 --export-path model_store --config-file model-config.yaml"
        terminal.type(f"{pack} --model-name trt --handler trt_llm_handler --extra-files engine,tokenizer")
        register = 'curl -sS -X POST "http://localhost:8081/models?url={}.mar&initial_workers=1&synchronous=true"'
        assert "registered" in terminal.type(register.format("trt"))
        [ask] = commands(page.next("bash", "Once upon a time").replace("predictions/llm", "predictions/trt"))
        told = terminal.type(ask)
        assert told.startswith('{"text": "f"}') and told.count('"text"') == 40

        terminal.write("three.py", page.next("python", "async def handle"))
        terminal.write("model-config.yaml", "asyncCommunication: true\nminWorkers: 1\nmaxWorkers: 1\n")
        terminal.type(f"{pack} --model-name three --handler three.py")
        assert "registered" in terminal.type(register.format("three"))
        assert terminal.type("curl -sS http://localhost:8080/predictions/three") == "one two three"
    page.end()


def test_security() -> None:
    page = Page("security.md")
    with Terminal() as terminal:
        archive(terminal.home, "echo")
        keys = page.next("properties", "disable_token_authorization=false")
        _restart_with(terminal, keys)
        written = json.loads((terminal.home / "key_file.json").read_text())
        shown = json.loads(page.next("json", '"API"'))
        assert {scope: key.keys() for scope, key in written.items()} == {
            scope: key.keys() for scope, key in shown.items()
        }
        key, ping, models = commands(page.next("bash", "key() {"))
        assert "Healthy" in terminal.type(f"{key}\n{ping}")
        assert '"echo"' in terminal.type(f"{key}\n{models}")
        terminal.type("curl -sS --fail http://127.0.0.1:8080/ping", status=22)
        [renew] = commands(page.next("bash", "/token?type=inference"))
        terminal.type(f"{key}\n{renew}")
        assert json.loads((terminal.home / "key_file.json").read_text())["inference"] != written["inference"]

        authority = Authority(terminal.home)
        for name in ("server", "team-a"):
            authority.pem(name)
        (terminal.home / "ca.pem").rename(terminal.home / "server-ca.pem")
        shutil.copy(terminal.home / "server-ca.pem", terminal.home / "clients-ca.pem")
        authority.keystore("changeit").rename(terminal.home / "server.p12")
        blocks = [page.next("properties", holding) for holding in ("certificate_file", "keystore")]
        served, store = [block.replace("/etc/wsgi-ts", str(terminal.home)) for block in blocks]
        insecure = page.next("bash", "--insecure").strip()
        level = page.next("properties", "tls_security_level")
        for more in (served, served.splitlines()[0] + "\n" + store, served + level):
            _restart_with(terminal, more + "disable_token_authorization=true\n")
            assert "Healthy" in _type_there(terminal, insecure)
        mutual = page.next("properties", "client_ca_file").replace("/etc/wsgi-ts", str(terminal.home))
        _restart_with(terminal, served + mutual + "disable_token_authorization=true\n")
        terminal.wait_for_workers("echo")
        asked = page.next("bash", "--cert team-a.pem").strip()
        assert _type_there(terminal, f"{asked} -H 'Content-Type: text/plain'") == "x"
        # The server closes the connection: while the request is sent, or while the answer is waited for.
        without = f"{asked.partition(' --cert')[0]} https://127.0.0.1:8443/ping"
        _type_there(terminal, f"{without}; case $? in 55|56) ;; *) exit 1 ;; esac")

        cors = page.next("properties", "cors_allowed_origin")
        _restart_with(terminal, cors)
        head = terminal.type("curl -sS -D - -o answer http://127.0.0.1:8080/ping").lower()
        for line in cors.splitlines():
            name, _, value = line.partition("=")
            assert f"access-control-allow-{name.rpartition('_')[2]}: {value}".lower() in head
    page.end()


def _restart_with(terminal: Terminal, keys: str) -> None:
    """Restarts the server, on the usual addresses but where the keys name others; 8443 is inference's."""
    terminal.type("torchserve --stop")
    terminal.wait_for_end()
    terminal.configure(preload_modules="", load_models="echo.mar")
    file = terminal.home / "config.properties"
    terminal.write("more.properties", keys.replace(":8443", ":8080"))
    more = (terminal.home / "more.properties").read_text()
    named = {line.partition("=")[0] for line in more.splitlines()}
    usual = [line for line in file.read_text().splitlines() if line.partition("=")[0] not in named]
    file.write_text("\n".join([*usual, more]))
    terminal.start_server("torchserve --start --ncs --model-store .")


def _type_there(terminal: Terminal, command: str, status: int = 0) -> str:
    return terminal.type(command.replace(":8443", ":8080"), status=status)
