"""The examples of models larger than one device, on the CPU: they answer what the model answers in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.archives import archive
from support.http import RawConnection
from support.made import make_once
from support.server import REPOSITORY, ServerProcess

pytestmark = pytest.mark.slow

EXAMPLES = REPOSITORY / "examples" / "large_models"
#: What lets an ill-matched torchvision be imported, which transformers looks for.
SITE = REPOSITORY / "tests" / "support" / "torchvision_cpu"
#: Example -> its model.
SERVED = {
    "llama_pp": "llama",
    "gpt2_pp": "gpt2",
    "llama_tp": "llama",
    "llama_pptp": "llama",
    "bloom_cpu": "llama",
    "spread": "llama",
}
#: Examples that are left out where a package is missing.
NEEDED = {"spread": "accelerate", "bloom_cpu": "deepspeed"}
PROMPTS = ["a", "The quick brown fox jumps over the lazy dog", "Grüße", "xyz " * 15]

#: Handlers as a tutorial prints them, with a model instead of the comment, and a `handle` besides.
PRINTED = """
import json
from abc import ABC
import torch
#DO import the necessary packages along with following
from ts.torch_handler.distributed.base_pippy_handler import BasePippyHandler
from ts.handler_utils.distributed.pt_pippy import initialize_rpc_workers, get_pipline_driver
class ModelHandler(BasePippyHandler, ABC):
    def __init__(self):
        super(ModelHandler, self).__init__()
        self.initialized = False

    def initialize(self, ctx):
        CONNECT
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(8, 8), torch.nn.Tanh())])
        self.device = self.local_rank %  torch.cuda.device_count()# being used to move model inputs to (self.device)
        self.model = get_pipline_driver(model,self.world_size, ctx)
        self.calls = 0

    def handle(self, data, context):
        self.calls += 1
        rows = [torch.tensor(json.loads(bytes(row["body"]))) for row in data]
        output = self.model(torch.stack(rows).to(self.device))
        more = {"rows": len(data), "calls": self.calls, "threads": torch.get_num_threads()}
        return [{"output": row.tolist(), **more} for row in output]
"""
#: What some tutorials have there besides.
CONNECT = "initialize_rpc_workers(self.local_rank, self.world_size, ctx)"
PRINTED_DEEPSPEED = """
from abc import ABC
import torch
from transformers import AutoModelForCausalLM
#DO import the necessary packages along with following
from ts.handler_utils.distributed.deepspeed import get_ds_engine
from ts.torch_handler.distributed.base_deepspeed_handler import BaseDeepSpeedHandler
class ModelHandler(BaseDeepSpeedHandler, ABC):
    def __init__(self):
        super(ModelHandler, self).__init__()
        self.initialized = False

    def initialize(self, ctx):
        self.model = AutoModelForCausalLM.from_pretrained(ctx.system_properties["model_dir"])
        ds_engine = get_ds_engine(self.model, ctx)
        self.model = ds_engine.module
        self.initialized = True

    def handle(self, data, context):
        with torch.inference_mode():
            ids = torch.tensor([list(row["body"]) for row in data])
            return self.model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
"""
PRINTED_DEEPSPEED_CONFIG = """\
#frontend settings
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 100
responseTimeout: 120
deviceType: "gpu"
parallelType: "tp" # options depending on the solution, pp(pipeline parallelism), tp(tensor parallelism)
                   # This will be used to route input to either rank0 or all ranks from fontend based on the solution
torchrun:
    nproc-per-node: 2 # specifies the number of processes torchrun starts to serve your model, set to world_size or
                      # number of gpus you wish to split your model
#backend settings
deepspeed:
    config: ds-config.json # DeepSpeed config json filename.
                           # Details:https://www.deepspeed.ai/docs/config-json/
handler:
    max_length: 80 # max length of tokens for tokenizer in the handler
"""
#: The streaming handler of the same tutorial, with the chunks that its client expects.
ECHO_STREAM = """
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.protocol.otf_message_handler import send_intermediate_predict_response as former_name
assert former_name is send_intermediate_predict_response
def handle(data, context):
    if type(data) is list:
        for i in range (4):
            send_intermediate_predict_response(["hello"], context.request_ids, "Intermediate Prediction success", 200,
                                               context)
        return ["hello world "]
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
    paths = [str(SITE), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """What the commands of the README make that need no server: models, and the archives of all examples."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "MODEL_CHECKPOINTS_PATH": "demo/large_models/llama"}
    pages = [EXAMPLES / "README.md", EXAMPLES / "torch_pipelining" / "README.md"]
    for line in "".join(page.read_text(encoding="utf-8") for page in pages).splitlines():
        if line.startswith(("python ", "torch-model-archiver ")):
            make_once(line, folder, partial(run, ["bash", "-c", line], environment | more, folder))
    return folder / "demo" / "large_models"


@pytest.fixture(scope="module")
def expected(demo: Path, environment: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The answers of each model in one process."""
    shim = REPOSITORY / "wsgi_ts" / "ts_shim"
    paths = {"PYTHONPATH": f"{environment['PYTHONPATH']}:{shim}:{EXAMPLES}"}
    folders = json.dumps({kind: str(demo / kind) for kind in set(SERVED.values())})
    text = run([sys.executable, "-c", REFERENCE, json.dumps(PROMPTS), folders], environment | paths)
    return dict(json.loads(text))


@pytest.fixture(scope="module")
def server(demo: Path, environment: dict[str, str]) -> Iterator[ServerProcess]:
    store = demo / "store"
    keys = {"parallelType": "pp", "torchrun": {"nproc-per-node": 2}, "pippy": {"chunks": 2}, "batchPolicy": "fixed"}
    on_gpus = json.dumps(keys | {"deviceType": "gpu"})
    archive(store, "printed", PRINTED.replace("CONNECT", "pass"), config_yaml=on_gpus)
    more_threads = json.dumps(keys | {"torchrun": {"nproc-per-node": 2, "OMP_NUMBER_THREADS": 2}})
    archive(store, "connected", PRINTED.replace("CONNECT", CONNECT), config_yaml=more_threads)
    archive(store, "echo_stream", ECHO_STREAM)
    # Imported once, and not by each rank of each model.
    config = {"preload_modules": "transformers.models.llama.modeling_llama,torch.distributed.tensor.parallel"}
    with ServerProcess(store=store, environment=environment, config=config) as server:
        yield server


@pytest.fixture(scope="module", params=SERVED)
def served(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[str]:
    """Each example in turn, registered."""
    name = str(request.param)
    if name in NEEDED:
        skip_without(NEEDED[name])
    reply = server.register(f"{name}.tar.gz")
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    yield name
    assert server.request("management", "DELETE", f"/models/{name}").status == 200


def skip_without(package: str) -> None:
    """Leaves a test out where a package is not installed; importing it takes seconds, and only the server needs it."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


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


@pytest.mark.parametrize(("name", "threads"), [("printed", 1), ("connected", 2)])
def test_a_handler_as_printed(server: ServerProcess, name: str, threads: int) -> None:
    reply = server.register(f"{name}.mar", batch_size=3, max_batch_delay=600_000)
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    rows = [[number / 10 + place / 7 for place in range(8)] for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda row: server.predict(name, json.dumps(row)), rows))
    assert [reply.status for reply in replies] == [200, 200, 200], server.log("model_log.log")[-4000:]
    wanted = printed_model()(torch.tensor(rows)).tolist()
    for reply, row in zip(replies, wanted, strict=True):
        assert reply.json()["rows"] == 3
        assert reply.json()["threads"] == threads
        assert reply.json()["output"] == pytest.approx(row, abs=1e-5)
    # Rows of the wrong width fail in the first stage; the group stays.
    before = workers(server, name)
    with ThreadPoolExecutor(3) as pool:
        failed = list(pool.map(lambda _: server.predict(name, "[1.0]").status, range(3)))
        again = list(pool.map(lambda row: server.predict(name, json.dumps(row)), rows))
    assert failed == [503, 503, 503]
    assert [reply.json()["calls"] for reply in again] == [3, 3, 3]
    assert workers(server, name) == before


def test_a_deepspeed_handler_as_printed(server: ServerProcess, demo: Path, expected: dict[str, Any]) -> None:
    skip_without("deepspeed")
    before = {*Path("/dev/shm").glob("deepspeed_*")}
    files = {file.name: file.read_bytes() for file in (demo / "llama").iterdir()}
    files["ds-config.json"] = (EXAMPLES / "deepspeed" / "cpu" / "ds-config.json").read_bytes()
    archive(server.store, "printed_ds", PRINTED_DEEPSPEED, files=files, config_yaml=PRINTED_DEEPSPEED_CONFIG)
    reply = server.register("printed_ds.mar")
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    for prompt, wanted in zip(PROMPTS, expected["llama"], strict=True):
        assert server.predict("printed_ds", prompt.encode()[:80]).json() == wanted["tokens"][0]
    # Its shared memory would stay there for good.
    assert {*Path("/dev/shm").glob("deepspeed_*")} <= before


def test_a_stream_as_printed(server: ServerProcess) -> None:
    assert server.register("echo_stream.mar").status == 200
    raw = server.raw()
    try:
        raw.send(b"POST /predictions/echo_stream HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nfoo")
        status, headers = raw.read_head()
        prediction = [chunk.decode() for chunk in raw.read_chunks()]
    finally:
        raw.close()
    assert status.startswith(b"HTTP/1.1 200 ")
    assert headers["transfer-encoding"] == "chunked"
    assert " ".join(prediction) == "hello hello hello hello hello world "


def test_stages_of_torch_itself(server: ServerProcess, demo: Path) -> None:
    reply = server.register("classifier.mar")
    assert reply.status == 200, f"{reply.text}\n{server.log('model_log.log')[-4000:]}"
    whole = classifier(demo)
    # Batches of one row, of a few, and full ones; texts that are shorter than max_length, and longer.
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda text: server.predict("classifier", text.encode()), PROMPTS * 4))
    replies.append(server.predict("classifier", PROMPTS[0].encode()))
    for reply, text in zip(replies, [*PROMPTS * 4, PROMPTS[0]], strict=True):
        tokens = list(text.encode())[:32]
        with torch.inference_mode():
            wanted = whole(torch.tensor([tokens + [256] * (32 - len(tokens))]))[0]
        assert reply.json()["scores"] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert reply.json()["class"] == int(wanted.argmax())
    assert len({tuple(reply.json()["scores"]) for reply in replies}) >= len(PROMPTS), "answers that say nothing"
    before = workers(server, "classifier")
    assert server.predict("classifier", b"").status == 400
    assert server.predict("classifier", b"after").status == 200
    assert workers(server, "classifier") == before


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


def classifier(demo: Path) -> Any:
    """The model of the example for torch.distributed.pipelining, in one piece."""
    spec = importlib.util.spec_from_file_location("classifier", EXAMPLES / "torch_pipelining" / "classifier.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Classifier()
    model.load_state_dict(torch.load(demo / "classifier.pt", weights_only=True))
    return model.eval()


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
