"""What tutorials for TorchServe tell their readers to type, typed here; the examples supply what they download.

`tutorials/` holds the files that they print, to the letter. Three things differ from what is printed: the ports
(`support.terminal`), `/home/Lan/` and `/home/model-server/` where a folder has to exist, and the number of workers
where a tutorial starts one per core of a large machine.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.eventually import eventually
from support.terminal import EXAMPLES, Terminal

from wsgi_ts.archive.manifest import load_model_yaml
from wsgi_ts.models.model_yaml import parse_model_yaml
from wsgi_ts.settings.sources import CommandLine, load_config

PRINTED = Path(__file__).with_name("tutorials")
#: What tutorials that are older than TorchServe 0.11.1 leave out, as it was the default then.
BEFORE_0_11_1 = {"disable_token_authorization": "true", "enable_model_api": "true"}
REGISTER = 'curl -X POST "http://localhost:8081/models?initial_workers=1&&url=/home/model-server/model-store/{}.mar"'
PREDICT = "curl http://localhost:8080/predictions/mnist -T ./Docker/mnist_images/0.png"


# Handwritten digits: register, describe, scale, unregister, upgrade


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


def test_ping(digits: Terminal) -> None:
    assert json.loads(digits.type("curl http://localhost:8080/ping")) == {"status": "Healthy"}


def test_every_digit_is_read(mnist: Terminal) -> None:
    assert mnist.type(PREDICT) == "0"
    read = [
        mnist.type(f"curl http://localhost:8080/predictions/mnist -T ./Docker/mnist_images/{digit}.png")
        for digit in range(10)
    ]
    # Training differs a little between processors.
    assert sum(answer == str(digit) for digit, answer in enumerate(read)) >= 8, read


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


def test_scaling(mnist: Terminal) -> None:
    answer = json.loads(mnist.type('curl -X PUT "http://localhost:8081/models/mnist?min_worker=3"'))
    assert answer == {"status": "Processing worker updates..."}
    mnist.wait_for_workers("mnist", 3)
    assert mnist.type(PREDICT) == "0"


def test_upgrade_by_registering_again(mnist: Terminal) -> None:
    answer = json.loads(mnist.type("curl -X DELETE http://localhost:8081/models/mnist"))
    assert answer == {"status": 'Model "mnist" unregistered'}
    assert json.loads(mnist.type(PREDICT))["code"] == 404
    mnist.type(REGISTER.format("mnist"))
    assert mnist.type(PREDICT) == "0"


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
