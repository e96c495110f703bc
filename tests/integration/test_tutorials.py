"""What tutorials for TorchServe tell their readers to type, typed here; the examples supply what they download.

`tutorials/` holds the files that they print, to the letter. Three things differ from what is printed: the ports
(`support.terminal`), `/home/Lan/` and `/home/model-server/` where a folder has to exist, and the number of workers
where a tutorial starts one per core of a large machine.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.eventually import eventually
from support.terminal import EXAMPLES, Terminal

from wsgi_ts.archive import load_model_yaml
from wsgi_ts.config_sources import CommandLine, load_config
from wsgi_ts.model_config import parse_model_yaml

PRINTED = Path(__file__).with_name("tutorials")
#: What tutorials that are older than TorchServe 0.11.1 leave out, as it was the default then.
BEFORE_0_11_1 = {"disable_token_authorization": "true", "enable_model_api": "true"}
REGISTER = 'curl -X POST "http://localhost:8081/models?initial_workers=1&&url=/home/model-server/model-store/{}.mar"'
PREDICT = "curl http://localhost:8080/predictions/mnist -T ./Docker/mnist_images/0.png"


# Handwritten digits: register, describe, scale, unregister, upgrade


#: What shares a server, or what the examples make: in one process.
in_group = pytest.mark.xdist_group


@pytest.fixture(scope="module")
def digits() -> Iterator[Terminal]:
    """A server on the printed configuration, with two versions of the digits model in its store."""
    with Terminal() as terminal:
        text = (PRINTED / "config.properties").read_text(encoding="utf-8")
        terminal.configure(text.replace("/home/model-server/", f"{terminal.home}/"), **BEFORE_0_11_1)
        for folder in ("model_store", "model-store", "wf-store"):
            (terminal.home / folder).mkdir()
        terminal.make("mnist/train.py", "Docker")
        for name in ("mnist", "mnist2"):
            terminal.copy(EXAMPLES / "mnist" / "mnist.py", f"{name}.py")
            terminal.copy(terminal.home / "Docker" / "mnist_cnn.pt", f"{name}_cnn.pt")
        terminal.copy(EXAMPLES / "mnist" / "mnist_handler.py", "mnist_handler.py")
        terminal.copy(PRINTED / "mnist_handler.txt", "mnist2_handler.py")
        terminal.type(
            "torch-model-archiver --model-name mnist --version 1.0 --model-file ./mnist.py "
            "--serialized-file ./mnist_cnn.pt --handler ./mnist_handler.py --export-path model_store"
        )
        # A space more than is printed after --model-file, where TorchServe's archiver wants one as well.
        terminal.type(
            "torch-model-archiver --model-name mnist --version 2.0 --model-file ./mnist2.py "
            "--serialized-file ./mnist2_cnn.pt --handler ./mnist2_handler.py "
        )
        terminal.type("mv mnist.mar model_store/mnist2.mar")
        terminal.start_server(f"torchserve --start --model-store {terminal.home}/model_store")
        yield terminal


@pytest.fixture
def mnist(digits: Terminal) -> Iterator[Terminal]:
    """The same with version 1.0 of the model registered; all versions are gone at the end of a test."""
    answer = json.loads(digits.type(REGISTER.format("mnist")))
    assert answer == {"status": 'Model "mnist" Version: 1.0 registered with 1 initial workers'}
    yield digits
    # Of several versions the default one goes last.
    digits.type("curl -X DELETE http://localhost:8081/models/mnist/2.0")
    digits.type("curl -X DELETE http://localhost:8081/models/mnist/1.0")


@in_group("tutorial digits")
def test_ping(digits: Terminal) -> None:
    assert json.loads(digits.type("curl http://localhost:8080/ping")) == {"status": "Healthy"}


@in_group("tutorial digits")
def test_every_digit_is_read(mnist: Terminal) -> None:
    assert mnist.type(PREDICT) == "0"
    read = [
        mnist.type(f"curl http://localhost:8080/predictions/mnist -T ./Docker/mnist_images/{digit}.png")
        for digit in range(10)
    ]
    # Training differs a little between processors.
    assert sum(answer == str(digit) for digit, answer in enumerate(read)) >= 8, read


@in_group("tutorial digits")
def test_list_and_describe(mnist: Terminal) -> None:
    url = "/home/model-server/model-store/mnist.mar"
    listed = json.loads(mnist.type("curl http://localhost:8081/models"))
    assert listed == {"models": [{"modelName": "mnist", "modelUrl": url}]}
    (described,) = json.loads(mnist.type("curl http://localhost:8081/models/mnist"))
    printed: dict[str, Any] = {
        "modelName": "mnist",
        "modelVersion": "1.0",
        "modelUrl": url,
        "runtime": "python",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 1,
        "maxBatchDelay": 100,
        "loadedAtStartup": False,
    }
    assert described | printed == described
    (worker,) = described["workers"]
    assert worker["status"] == "READY"
    assert worker.keys() >= {"id", "startTime", "status", "memoryUsage", "pid", "gpu", "gpuUsage"}


@in_group("tutorial digits")
def test_scaling(mnist: Terminal) -> None:
    answer = json.loads(mnist.type('curl -X PUT "http://localhost:8081/models/mnist?min_worker=3"'))
    assert answer == {"status": "Processing worker updates..."}
    mnist.wait_for_workers("mnist", 3)
    assert mnist.type(PREDICT) == "0"


@in_group("tutorial digits")
def test_upgrade_by_registering_again(mnist: Terminal) -> None:
    answer = json.loads(mnist.type("curl -X DELETE http://localhost:8081/models/mnist"))
    assert answer == {"status": 'Model "mnist" unregistered'}
    assert json.loads(mnist.type(PREDICT))["code"] == 404
    mnist.type(REGISTER.format("mnist"))
    assert mnist.type(PREDICT) == "0"


@in_group("tutorial digits")
def test_upgrade_by_version_fails_no_request(mnist: Terminal) -> None:
    image = (mnist.home / "Docker" / "mnist_images" / "0.png").read_bytes()
    statuses: list[int] = []
    enough = threading.Event()

    def ask_again_and_again() -> None:
        while not enough.is_set():
            statuses.append(mnist.request("8080", "PUT", "/predictions/mnist", image).status)

    clients = [threading.Thread(target=ask_again_and_again) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        answer = json.loads(mnist.type(REGISTER.format("mnist2")))
        assert answer == {"status": 'Model "mnist" Version: 2.0 registered with 1 initial workers'}
        assert mnist.type("curl http://localhost:8080/predictions/mnist/2.0 -T ./Docker/mnist_images/0.png") == "0"
        mnist.type("curl -X PUT http://localhost:8081/models/mnist/2.0/set-default")
        mnist.type("curl -X DELETE http://localhost:8081/models/mnist/1.0")
        asked = len(statuses)
        eventually(lambda: len(statuses) > asked + 50, within=30, what="requests to the new version")
    finally:
        enough.set()
        for client in clients:
            client.join()
    assert set(statuses) == {200}
    (described,) = json.loads(mnist.type("curl http://localhost:8081/models/mnist"))
    assert described["modelVersion"] == "2.0"


# Handlers from the same tutorial, on the same server


@in_group("tutorial digits")
def test_handler_template(digits: Terminal) -> None:
    digits.make("handler_template/make_model.py", "template")
    digits.copy(EXAMPLES / "handler_template" / "handler.py", "template/handler.py")
    digits.type(
        "torch-model-archiver --model-name template --version 1.0 --serialized-file template/model.pt "
        "--handler template/handler.py --export-path model_store"
    )
    digits.type('curl -X POST "http://localhost:8081/models?url=template.mar&initial_workers=1&batch_size=4"')
    mean = "curl http://localhost:8080/predictions/template -H 'Content-Type: application/json' -d '[1.0, 2.0, 6.0]'"
    assert json.loads(digits.type(mean)) == 3.0
    digits.type("curl -X DELETE http://localhost:8081/models/template")


@in_group("tutorial digits")
def test_device_of_the_multi_gpu_handler(digits: Terminal) -> None:
    snippet = (PRINTED / "multi_gpu_handler.txt").read_text()
    answering = "\n    def handle(self, data, context):\n        return [str(self.device) for _ in data]\n"
    digits.write("multi_gpu.py", snippet + answering)
    digits.type("torch-model-archiver --model-name multi -v 1.0 --handler multi_gpu.py --export-path model_store")
    digits.type('curl -X POST "http://localhost:8081/models?url=multi.mar&initial_workers=1"')
    (worker,) = digits.request("8081", "GET", "/models/multi").json()[0]["workers"]
    device = digits.type("curl http://localhost:8080/predictions/multi")
    assert device.startswith("cuda:") if worker["gpu"] else device == "cpu"
    digits.type("curl -X DELETE http://localhost:8081/models/multi")


@in_group("tutorial digits")
def test_micro_batching(digits: Terminal) -> None:
    example = EXAMPLES / "micro_batching"
    digits.type(
        f"torch-model-archiver --model-name pieces --version 1.0 --model-file mnist.py --serialized-file mnist_cnn.pt "
        f"--handler {example}/handler.py --extra-files mnist_handler.py --config-file {example}/model-config.yaml "
        "--export-path model_store"
    )
    digits.type('curl -X POST "http://localhost:8081/models?url=pieces.mar"')
    digits.wait_for_workers("pieces")
    images = "Docker/mnist_images/[0-9].png"
    answers = digits.type(f"curl --no-progress-meter -Z -T '{images}' http://localhost:8080/predictions/pieces")
    assert len(answers) == 10
    assert len(set(answers)) >= 8, answers
    digits.type("curl -X DELETE http://localhost:8081/models/pieces")


# A sentence encoder from Hugging Face


@pytest.fixture(scope="module")
def encoder() -> Iterator[Terminal]:
    """The model's folder as printed, archived both ways, and the printed configuration. No server yet."""
    with Terminal() as terminal:
        terminal.make("huggingface_embedding/make_model.py", "bge-large-zh")
        text = (PRINTED / "torchserve.config").read_text(encoding="utf-8")
        text = text.replace("default_workers_per_model=32", "default_workers_per_model=1")
        terminal.write("torchserve.config", text + "disable_token_authorization=true\n")
        (terminal.home / "model-store").mkdir()
        terminal.type(
            "torch-model-archiver -f --model-name bge_large_zh --version 1.0 "
            "--serialized-file bge-large-zh/pytorch_model.bin --handler bge-large-zh/handler.py "
            '--extra-files "bge-large-zh/" '
        )
        terminal.type("mv bge_large_zh.mar model-store/")
        terminal.type(
            "torch-model-archiver -f --model-name=bge_large_zh --version=1.0 "
            "--serialized-file=bge-large-zh/pytorch_model.bin --handler=bge-large-zh/handler.py "
            '--extra-files="bge-large-zh/" --archive-format=no-archive --export-path=no-archive'
        )
        terminal.type("""echo '{"input":"教练, 我想打篮球."}' > note.txt""")
        yield terminal


ENCODE_FILE = "curl -X POST  http://localhost:8080/predictions/bge_large_zh -T note.txt"
ENCODE_TEXT = (
    "curl -X POST --header 'Content-Type: application/json'  http://localhost:8080/predictions/bge_large_zh "
    """--data-raw '{"input":"如何使用torchserve部署模型"}'"""
)
#: Printed with 1000 for 10, and with its first words twice: curl would ask a host named curl as well.
ENCODE_FIVE = (
    "for i in $(seq 10); do curl -X POST --header 'Content-Type: application/json'  "
    "http://localhost:8080/predictions/bge_large_zh "
    """--data-raw '{"input":["教练, 我想打篮球.", "如何使用torchserve部署模型", "怎么训练bert模型", """
    """"怎么使用tensorflow训练bert模型", "怎么使用tfserving部署bert模型"]}'; done"""
)


def vectors(text: str, count: int) -> list[list[float]]:
    """An answer of the encoder, checked for its form."""
    answer: list[list[float]] = json.loads(text)
    assert len(answer) == count
    for vector in answer:
        assert sum(number * number for number in vector) == pytest.approx(1, abs=1e-3)
    return answer


@in_group("tutorial encoder")
@pytest.mark.slow
def test_encoder_from_an_archive_and_from_a_folder(encoder: Terminal) -> None:
    answers = []
    for models in (
        "--model-store=model-store/ --models bge_large_zh=bge_large_zh.mar",
        "--model-store=no-archive --models bge_large_zh=bge_large_zh",
    ):
        encoder.start_server(f"torchserve --start --ncs {models} --ts-config=torchserve.config")
        encoder.wait_for_workers("bge_large_zh")
        answers.append((vectors(encoder.type(ENCODE_FILE), 1), vectors(encoder.type(ENCODE_TEXT), 1)))
        one_after_another = encoder.type(ENCODE_FIVE).replace("][", "]\n\n[")
        assert [len(vectors(answer, 5)) for answer in one_after_another.split("\n\n")] == [5] * 10
        listed = json.loads(encoder.type('curl "http://localhost:8081/models"'))
        assert listed == {"models": [{"modelName": "bge_large_zh", "modelUrl": models.rpartition("=")[2]}]}
        described = json.loads(encoder.type("curl -X OPTIONS http://localhost:8080"))
        assert described["openapi"] == "3.0.1"
        assert described["info"]["title"] == "TorchServe APIs"
        assert described["paths"]["/predictions/{model_name}"]["post"]["operationId"] == "predictions"
        encoder.type("torchserve --stop")
        encoder.wait_for_end()
    assert answers[0] == answers[1]


# Images with a bundled handler


@in_group("tutorial densenet161")
@pytest.mark.slow
def test_densenet161() -> None:
    with Terminal() as terminal:
        terminal.configure()
        terminal.make("densenet161/make_files.py")
        terminal.copy(EXAMPLES / "densenet161" / "model.py", "serve/examples/image_classifier/densenet_161/model.py")
        terminal.copy(terminal.home / "index_to_name.json", "serve/examples/image_classifier/index_to_name.json")
        terminal.type("mkdir model_store")
        terminal.type(
            "torch-model-archiver --model-name densenet161 --version 1.0 "
            "--model-file ./serve/examples/image_classifier/densenet_161/model.py "
            "--serialized-file densenet161-8d451a50.pth --export-path model_store "
            "--extra-files ./serve/examples/image_classifier/index_to_name.json --handler image_classifier"
        )
        assert terminal.type("ls model_store/") == "densenet161.mar\n"
        terminal.start_server("torchserve --start --ncs --model-store model_store --models densenet161.mar")
        terminal.wait_for_workers("densenet161")
        answer = json.loads(terminal.type("curl http://127.0.0.1:8080/predictions/densenet161 -T kitten_small.jpg"))
        labels = set(json.loads((terminal.home / "index_to_name.json").read_text()).values())
        assert len(answer) == 5
        assert answer.keys() <= labels
        likelihoods = list(answer.values())
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert all(0 < likelihood < 1 for likelihood in likelihoods)
        assert (terminal.home / "logs" / "access_log.log").read_text().count("/predictions/densenet161") == 1


# The examples' own pages


PAGES = sorted(str(page.parent.relative_to(EXAMPLES)) for page in EXAMPLES.glob("*/**/README.md"))


def group_of(page: str) -> str:
    """Pages whose commands make the same models, in one process: they are made once there."""
    shared = {"huggingface_embedding": "encoder", "mnist": "digits", "micro_batching": "digits"}
    return f"tutorial {shared.get(page, page)}"


def commands_of(page: Path) -> list[str]:
    """The lines of a page's bash blocks, without downloads and comments; blocks marked sh need what is not here."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if "https://" not in line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=in_group(group_of(name))) for name in PAGES])
def test_commands_of_an_example(name: str) -> None:
    with Terminal() as terminal:
        terminal.configure()
        shutil.copytree(EXAMPLES, terminal.home / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for config in EXAMPLES.rglob("*.config"):
            terminal.write(f"examples/{config.relative_to(EXAMPLES)}", config.read_text())
        terminal.write(".curlrc", "fail-with-body\n")
        for command in commands_of(EXAMPLES / name / "README.md"):
            if not command.startswith("torchserve --start"):
                terminal.type(command)
                continue
            terminal.start_server(command)
            at_start = re.search(r"--models (\w+)", command)
            if at_start is not None:
                terminal.wait_for_workers(at_start.group(1))


# Files that are printed and not served


@pytest.mark.parametrize("name", ["config.properties", "torchserve.config"])
def test_printed_configuration_is_read(name: str, tmp_path: Path) -> None:
    text = (PRINTED / name).read_text(encoding="utf-8").replace("/home/model-server/", f"{tmp_path}/")
    (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "model-store").mkdir()
    (tmp_path / "wf-store").mkdir()
    command_line = CommandLine(ts_config=str(tmp_path / name), model_store=str(tmp_path / "model-store"))
    config = load_config(command_line, {"TEMP": str(tmp_path)})
    assert str(config.inference_address) == "http://0.0.0.0:8080"
    if name == "config.properties":
        assert config.job_queue_size == 1000
    else:
        assert config.default_workers_per_model == 32
        assert config.async_logging


def test_large_model_archive_as_printed() -> None:
    with Terminal() as terminal:
        terminal.copy(PRINTED / "large-model-config.yaml", "model-config.yaml")
        terminal.write("pippy_handler.py", "def handle(data, context):\n    return data\n")
        terminal.write("requirements.txt", "transformers\n")
        terminal.write("checkpoints/model.bin", "weights")
        terminal.type(
            "MODEL_CHECKPOINTS_PATH=checkpoints; torch-model-archiver --model-name bloom --version 1.0 "
            "--handler pippy_handler.py --extra-files $MODEL_CHECKPOINTS_PATH -r requirements.txt "
            "--config-file model-config.yaml --archive-format tgz"
        )
        assert set(terminal.type("tar tzf bloom.tar.gz | grep -v '/$'").split()) == {
            f"bloom/{name}"
            for name in (
                "MAR-INF/MANIFEST.json",
                "model-config.yaml",
                "model.bin",
                "pippy_handler.py",
                "requirements.txt",
            )
        }
        settings = parse_model_yaml(load_model_yaml(terminal.home / "model-config.yaml"))
        assert settings.warnings == ()
        assert settings.parallel_type == "pp"
        assert settings.torchrun is not None
        assert settings.torchrun.nproc_per_node == 4
        assert settings.raw["pippy"]["input_names"] == ["input_ids"]


def test_workflow_archive_of_the_printed_graph() -> None:
    with Terminal() as terminal:
        terminal.copy(PRINTED / "workflow.yaml", "workflow.yaml")
        terminal.write("workflow_handler.py", "def pre_processing(data, context):\n    return data\n")
        terminal.type(
            "torch-workflow-archiver --workflow-name graph --spec-file workflow.yaml --handler workflow_handler.py"
        )
        with zipfile.ZipFile(terminal.home / "graph.war") as archive:
            specification = yaml.safe_load(archive.read("workflow.yaml"))
        assert specification["models"]["m1"]["batch-size"] == 4
        assert specification["dag"]["m4"] == ["postprocessing"]
