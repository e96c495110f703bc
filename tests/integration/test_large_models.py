"""The examples of models larger than one device, on the CPU: they answer what the model answers in one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.archives import archive
from support.http import RawConnection
from support.server import REPOSITORY, ServerProcess

pytestmark = pytest.mark.slow

EXAMPLES = REPOSITORY / "examples" / "large_models"
#: What lets an ill-matched torchvision be imported, which transformers looks for.
SITE = REPOSITORY / "tests" / "support" / "torchvision_cpu"
#: Example -> its model.
SERVED = {"llama_pp": "llama", "gpt2_pp": "gpt2", "llama_tp": "llama", "llama_pptp": "llama", "spread": "llama"}
#: Examples that are left out where a package is missing.
NEEDED = {"spread": "accelerate"}
PROMPTS = ["a", "The quick brown fox jumps over the lazy dog", "Grüße", "xyz " * 15]

#: A handler as a tutorial prints it, with a model instead of the comment and no GPU.
PRINTED = """
import json
from abc import ABC
import torch
from ts.torch_handler.distributed.base_pippy_handler import BasePippyHandler
from ts.handler_utils.distributed.pt_pippy import initialize_rpc_workers, get_pipline_driver

class ModelHandler(BasePippyHandler, ABC):
    def __init__(self):
        super(ModelHandler, self).__init__()
        self.initialized = False

    def initialize(self, ctx):
        initialize_rpc_workers(self.local_rank, self.world_size, ctx)
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (torch.nn.Linear(8, 8), torch.nn.Tanh())]
        model = torch.nn.Sequential(*layers)
        self.model = get_pipline_driver(model, self.world_size, ctx)
        self.calls = 0

    def handle(self, data, context):
        self.calls += 1
        rows = [torch.tensor(json.loads(bytes(row["body"]))) for row in data]
        output = self.model(torch.stack(rows))
        return [{"output": row.tolist(), "rows": len(data), "calls": self.calls} for row in output]
"""


#: What the models answer in one process, prompt by prompt.
REFERENCE = """
import json, sys
from transformers import AutoModelForCausalLM
from text_generation import Prompt, generate

prompts = json.loads(sys.argv[1])
answers = {}
for kind, folder in json.loads(sys.argv[2]).items():
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    made = [generate(model, [Prompt(list(prompt.encode())[:80], 12, False)], "cpu")[0] for prompt in prompts]
    answers[kind] = [result.as_json() for result in made]
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Variables of the commands and of the server."""
    return {"PYTHONPATH": f"{SITE}:{REPOSITORY}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """What the commands of the README make that need no server: models, and the archives of all examples."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "MODEL_CHECKPOINTS_PATH": "demo/large_models/llama"}
    lines = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith(("python ", "torch-model-archiver ")):
            run(["bash", "-c", line], environment | more, folder)
    return folder / "demo" / "large_models"


@pytest.fixture(scope="module")
def expected(demo: Path, environment: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The answers of each model in one process."""
    shim = REPOSITORY / "handlers" / "ts_shim"
    paths = {"PYTHONPATH": f"{environment['PYTHONPATH']}:{shim}:{EXAMPLES}"}
    folders = json.dumps({kind: str(demo / kind) for kind in set(SERVED.values())})
    text = run([sys.executable, "-c", REFERENCE, json.dumps(PROMPTS), folders], environment | paths)
    return dict(json.loads(text))


@pytest.fixture(scope="module")
def server(demo: Path, environment: dict[str, str]) -> Iterator[ServerProcess]:
    store = demo / "store"
    keys = {"parallelType": "pp", "torchrun": {"nproc-per-node": 2}, "pippy": {"chunks": 2}, "batchPolicy": "fixed"}
    archive(store, "printed", PRINTED, config_yaml=json.dumps(keys | {"deviceType": "cpu"}))
    with ServerProcess(store=store, environment=environment) as server:
        yield server


@pytest.fixture(scope="module", params=SERVED)
def served(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[str]:
    """Each example in turn, registered."""
    name = str(request.param)
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    reply = server.register(f"{name}.tar.gz")
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    yield name
    assert server.request("management", "DELETE", f"/models/{name}").status == 200


def run(command: list[str | Path], environment: dict[str, str], folder: Path | None = None) -> str:
    """Runs a command to its end and returns what it printed."""
    done = subprocess.run(
        command, env=os.environ | environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def ask(server: ServerProcess, model: str, prompt: str) -> dict[str, Any]:
    """The model's answer to a prompt."""
    body = json.dumps({"prompt": prompt, "max_new_tokens": 12})
    reply = server.predict(model, body, content_type="application/json")
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    return dict(reply.json())


def assert_same(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same tokens, found as likely."""
    assert answer["tokens"] == expected["tokens"]
    assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)


def test_prompts_of_different_lengths_one_by_one(server: ServerProcess, served: str, expected: dict[str, Any]) -> None:
    answers = expected[SERVED[served]]
    assert len({tuple(answer["tokens"]) for answer in answers}) == len(PROMPTS), "answers that say nothing"
    for prompt, wanted in zip(PROMPTS, answers, strict=True):
        assert_same(ask(server, served, prompt), wanted)


def test_prompts_of_different_lengths_at_once(server: ServerProcess, served: str, expected: dict[str, Any]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(server, served, prompt), PROMPTS * 2))
    for answer, wanted in zip(answers, expected[SERVED[served]] * 2, strict=True):
        assert_same(answer, wanted)


def test_tokens_are_streamed(server: ServerProcess, served: str, expected: dict[str, Any]) -> None:
    raw = server.raw()
    try:
        send_stream(raw, served, 12)
        _, headers = raw.read_head()
        chunks = list(raw.read_chunks())
    finally:
        raw.close()
    assert headers["transfer-encoding"] == "chunked"
    pieces = [json.loads(line) for line in b"".join(chunks).splitlines()]
    joined = {name: [value for piece in pieces for value in piece[name]] for name in ("tokens", "logprobs")}
    assert_same(joined, expected[SERVED[served]][1])
    assert len(pieces) == 12
    assert len(chunks) > 1


def test_a_client_that_hangs_up_while_tokens_come_costs_nobody_else(server: ServerProcess, served: str) -> None:
    before = workers(server, served)
    raw = server.raw()
    send_stream(raw, served, 64)
    raw.read_head()
    raw.close()
    ask(server, served, "after")
    assert workers(server, served) == before


def test_a_prompt_that_is_none_is_answered_and_the_group_goes_on(server: ServerProcess, served: str) -> None:
    before = workers(server, served)
    reply = server.predict(served, json.dumps({"prompt": ""}), content_type="application/json")
    assert reply.status == 400
    ask(server, served, "after")
    assert workers(server, served) == before


def test_a_handler_as_printed(server: ServerProcess) -> None:
    reply = server.register("printed.mar", batch_size=3, max_batch_delay=60_000)
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    rows = [[number / 10 + place / 7 for place in range(8)] for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda row: server.predict("printed", json.dumps(row)), rows))
    assert [reply.status for reply in replies] == [200, 200, 200], server.log("model_log.log")[-4000:]
    wanted = printed_model()(torch.tensor(rows)).tolist()
    for reply, row in zip(replies, wanted, strict=True):
        assert reply.json()["rows"] == 3
        assert reply.json()["output"] == pytest.approx(row, abs=1e-5)
    # Rows of the wrong width fail in the first stage; the group stays.
    before = workers(server, "printed")
    with ThreadPoolExecutor(3) as pool:
        failed = list(pool.map(lambda _: server.predict("printed", "[1.0]").status, range(3)))
        again = list(pool.map(lambda row: server.predict("printed", json.dumps(row)), rows))
    assert failed == [503, 503, 503]
    assert [reply.json()["calls"] for reply in again] == [3, 3, 3]
    assert workers(server, "printed") == before


def test_the_handler_of_the_documentation(server: ServerProcess, demo: Path, expected: dict[str, Any]) -> None:
    page = (REPOSITORY / "docs" / "large-models.md").read_text(encoding="utf-8")
    handler, config = (re.search(rf"```{kind}\n(.*?)```", page, re.S) for kind in ("python", "yaml"))
    assert handler is not None and config is not None
    files = {file.name: file.read_bytes() for file in (demo / "llama").iterdir()}
    archive(server.store, "documented", handler[1], files=files, config_yaml=config[1])
    reply = server.register("documented.mar")
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    for prompt, wanted in zip(PROMPTS, expected["llama"], strict=True):
        assert server.predict("documented", prompt.encode()[:80]).json() == wanted["tokens"][0]


def printed_model() -> torch.nn.Module:
    """What the printed handler serves, in one piece."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(8, 8), torch.nn.Tanh())])


def send_stream(raw: RawConnection, model: str, tokens: int) -> None:
    """Asks for a stream of tokens."""
    body = json.dumps({"prompt": PROMPTS[1], "max_new_tokens": tokens, "stream": True}).encode()
    head = f"POST /predictions/{model} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def workers(server: ServerProcess, model: str) -> list[tuple[str, int]]:
    """Id and pid of each of the model's workers."""
    described = server.request("management", "GET", f"/models/{model}").json()[0]
    return [(worker["id"], worker["pid"]) for worker in described["workers"]]
