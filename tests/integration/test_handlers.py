"""The handlers that the server brings along, named in archives and asked over HTTP; one server for all."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, WITH_TORCH, ServerProcess

#: What lets an ill-matched torchvision be imported, in the processes of the test's server alone.
SITE = REPOSITORY / "tests" / "support" / "torchvision_cpu"

LABELS = {"0": ["n01", "tabby"], "1": ["n02", "tiger_cat"], "2": ["n03", "lynx"], "3": "fox", "4": "wolf", "5": "dog"}

#: The mean of each colour, spread over six classes.
CLASSIFIER = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 6)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))
"""

SEGMENTER = """
import torch

class Net(torch.nn.Module):
    def forward(self, images):
        return {"out": torch.stack([images[:, 0], images[:, 2]], dim=1)}
"""

DETECTOR = """
import torch

class Net(torch.nn.Module):
    def forward(self, images):
        size = [[0.0, 0.0, float(image.shape[2]), float(image.shape[1])] for image in images]
        return [
            {"boxes": torch.tensor([box, box]), "labels": torch.tensor([1, 0]), "scores": torch.tensor([0.75, 0.25])}
            for box in size
        ]
"""

BAG = """
import torch

class Bag(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(5, 2, mode="sum")
        self.fc = torch.nn.Linear(2, 2, bias=False)

    def forward(self, text, offsets):
        return self.fc(self.embedding(text, offsets))
"""

NUMBERS = """
from ts.torch_handler.base_handler import BaseHandler

class Numbers(BaseHandler):
    def preprocess(self, data):
        return super().preprocess([row["body"] for row in data])
"""

DOUBLE = """
import torch

class Double(torch.nn.Module):
    def forward(self, x):
        return x * 2.0
"""

MICRO_BATCHING = """
import threading
from ts.handler_utils.micro_batching import MicroBatching
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        options = context.model_yaml_config["micro_batching"]
        self.context = context
        self.handle = MicroBatching(self, micro_batch_size=options["micro_batch_size"])
        self.handle.parallelism = options["parallelism"]

    def preprocess(self, data):
        return [(row["body"], threading.current_thread().name) for row in data]

    def inference(self, data):
        return [[*row, self.handle.get_micro_batch_idx(), len(data)] for row in data]

    def postprocess(self, data):
        return [[*row, threading.current_thread().name] for row in data]
"""

STREAM = """
from ts.protocol.otf_message_handler import send_intermediate_predict_response as old_name
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    send_intermediate_predict_response(["one "] * len(data), context.request_ids, "Intermediate", 200, context)
    old_name(["two "] * len(data), context.request_ids, "Intermediate", 200, context)
    return ["three"] * len(data)
"""


WARM = """
seen = []

def handle(data, context):
    if data is None:
        return None
    if data[0]["body"] == "raise":
        raise ValueError("asked to")
    seen.extend(row["body"] for row in data)
    return [seen] * len(data)
"""
WARM_UP = "handler: {warm_up: [sample.json, broken.json, missing.json, ../outside]}"


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def onnx_double() -> bytes:
    helper = pytest.importorskip("onnx.helper")
    number = helper.TensorProto if hasattr(helper, "TensorProto") else pytest.importorskip("onnx").TensorProto
    shape = ["rows", 2]
    node = helper.make_node("Add", ["x", "x"], ["y"])
    graph = helper.make_graph(
        [node],
        "double",
        [helper.make_tensor_value_info("x", number.FLOAT, shape)],
        [helper.make_tensor_value_info("y", number.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def exported_double(folder: Path) -> bytes:
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2.0

    path = folder / "model.pt2"
    torch.export.save(torch.export.export(Double(), (torch.zeros(1, 2),)), path)
    return path.read_bytes()


def bundled(store: Path, name: str, handler: str, model: str, **arguments: Any) -> None:
    """An archive that names a bundled handler and has an eager model."""
    files = {"model.py": model, **arguments.pop("files", {})}
    overrides = {"handler": handler, "modelFile": "model.py", **arguments.pop("overrides", {})}
    archive(store, name, files=files, manifest_overrides=overrides, **arguments)


def fill(store: Path, folder: Path) -> None:
    labels = {"index_to_name.json": json.dumps(LABELS)}
    weights = {"linear.weight": torch.arange(18.0).reshape(6, 3) / 18, "linear.bias": torch.zeros(6)}
    weighted = {"serializedFile": "weights.pt"}
    colour_files = {**labels, "weights.pt": saved(weights)}
    bundled(store, "classifier", "image_classifier", CLASSIFIER, files=colour_files, overrides=weighted)
    bundled(store, "densenet", "densenet_handler", CLASSIFIER, files=colour_files, overrides=weighted)
    bundled(store, "segmenter", "image_segmenter", SEGMENTER)
    bundled(store, "detector", "object_detector", DETECTOR, files=labels)
    bag = {"embedding.weight": torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 2.0]]), "fc.weight": torch.eye(2)}
    words = {word: index for index, word in enumerate(["<unk>", "good", "bad", "very", "very good"])}
    text_files = {
        "weights.pt": saved(bag),
        "source_vocab.pt": saved(words),
        "index_to_name.json": '{"0": "negative", "1": "positive"}',
    }
    bundled(store, "text", "text_classifier", BAG, files=text_files, overrides=weighted)
    archive(store, "onnx", NUMBERS, files={"m.onnx": onnx_double()}, manifest_overrides={"serializedFile": "m.onnx"})
    exported = {"files": {"m.pt2": exported_double(folder)}, "manifest_overrides": {"serializedFile": "m.pt2"}}
    archive(store, "exported", NUMBERS, config_yaml="weightsOnly: false", **exported)
    archive(store, "exported_untrusted", NUMBERS, **exported)
    eager = {"files": {"model.py": DOUBLE}, "manifest_overrides": {"modelFile": "model.py"}}
    compiled = "pt2: {compile: {enable: true, backend: eager, fullgraph: true}}"
    archive(store, "compiled", NUMBERS, config_yaml=compiled, **eager)
    archive(store, "uncompiled", NUMBERS, config_yaml="pt2: nonsense", **eager)
    micro = """
        batchSize: 5
        maxBatchDelay: 120000
        batchPolicy: fixed
        micro_batching: {micro_batch_size: 2, parallelism: {preprocess: 2, inference: 1, postprocess: 1}}
    """
    archive(store, "micro", MICRO_BATCHING, config_yaml=micro)
    archive(store, "stream", STREAM)
    warm = {"sample.json": "[1, 2]", "broken.json": '"raise"'}
    archive(store, "warm", WARM, files=warm, config_yaml=WARM_UP)
    bundled(store, "dali", "dali_image_classifier", CLASSIFIER)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    fill(store, tmp_path_factory.mktemp("work"))
    with ServerProcess(
        store=store,
        config={"max_response_size": str(32 << 20), **WITH_TORCH},
        environment={"PYTHONPATH": f"{SITE}:{REPOSITORY}"},
    ) as server:
        yield server


def served(server: ServerProcess, model: str) -> ServerProcess:
    """The server, with this model registered."""
    if server.request("management", "GET", f"/models/{model}").status == 404:
        reply = server.register(f"{model}.mar")
        assert reply.status == 200, reply.text + server.output()[-3000:]
    return server


def picture(colour: str, size: tuple[int, int] = (300, 260), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def normalised(colour: tuple[float, float, float]) -> torch.Tensor:
    """What the pretrained models' transform makes of an image of one colour."""
    return (torch.tensor(colour) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])


@pytest.mark.parametrize("model", ["classifier", "densenet"])
def test_an_image_is_classified(server: ServerProcess, model: str) -> None:
    reply = served(server, model).predict(model, picture("red"), content_type="image/png")
    assert reply.status == 200, reply.text
    logits = torch.arange(18.0).reshape(6, 3) / 18 @ normalised((1, 0, 0))
    values, classes = torch.topk(torch.softmax(logits, dim=0), 5)
    names = ["tabby", "tiger_cat", "lynx", "fox", "wolf", "dog"]
    assert list(reply.json()) == [names[index] for index in classes]
    assert list(reply.json().values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_an_image_is_taken_in_every_form(server: ServerProcess) -> None:
    served(server, "classifier")
    plain = server.predict("classifier", picture("red")).json()
    as_text = server.predict("classifier", base64.b64encode(picture("red")), content_type="text/plain")
    assert as_text.json() == plain
    transparent = server.predict("classifier", picture("red", mode="RGBA"))
    assert transparent.json() == plain
    pixels = normalised((1, 0, 0))[:, None, None].expand(3, 2, 2).tolist()
    as_numbers = server.predict("classifier", json.dumps(pixels), content_type="application/json")
    assert as_numbers.json() == pytest.approx(plain, abs=1e-5)


def test_what_is_no_image_fails(server: ServerProcess) -> None:
    reply = served(server, "classifier").predict("classifier", b"not an image")
    assert (reply.status, reply.json()["message"]) == (503, "Prediction failed")


def test_an_image_is_segmented(server: ServerProcess) -> None:
    reply = served(server, "segmenter").predict("segmenter", picture("blue"))
    answer = torch.tensor(reply.json())
    assert answer.shape == (224, 224, 2)
    red, _, blue = normalised((0, 0, 1))
    assert answer[..., 0].unique().tolist() == [1]
    assert answer[0, 0, 1].item() == pytest.approx(torch.softmax(torch.stack([red, blue]), 0)[1].item(), abs=1e-4)


def test_objects_are_detected(server: ServerProcess) -> None:
    reply = served(server, "detector").predict("detector", picture("blue", size=(40, 30)))
    assert reply.json() == [{"tiger_cat": [0.0, 0.0, 40.0, 30.0], "score": 0.75}]


def test_an_image_is_explained(server: ServerProcess) -> None:
    served(server, "classifier")
    body, boundary = form({"data": picture("red"), "target": b"2"})
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    reply = server.request("inference", "POST", "/explanations/classifier", headers=headers, body=body)
    assert reply.status == 200, reply.text
    attributions = torch.tensor(reply.json())
    assert attributions.shape == (3, 224, 224)
    # The model is linear: what a colour's pixels contribute is its weight times the colour's value.
    expected = torch.arange(18.0).reshape(6, 3)[2] / 18 * normalised((1, 0, 0))
    assert attributions.sum(dim=(1, 2)).tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def form(parts: dict[str, bytes]) -> tuple[bytes, str]:
    body = b""
    for name, value in parts.items():
        file = f'; filename="{name}"' if len(value) > 10 else ""
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
    return body + b"--b--\r\n", "b"


def test_a_text_is_classified_and_explained(server: ServerProcess) -> None:
    served(server, "text")
    reply = server.predict("text", "<p>Very good!</p>", content_type="text/plain")
    negative, positive = torch.softmax(torch.tensor([0.0, 3.0]), 0).tolist()
    assert reply.json() == pytest.approx({"negative": negative, "positive": positive})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    reply = server.request("inference", "POST", "/explanations/text", headers=headers, body="data=very+good&target=1")
    answer = reply.json()
    assert answer["words"] == ["very", "good", "very good"]
    assert answer["importances"] == pytest.approx([0, 5**-0.5, 2 * 5**-0.5], abs=1e-5)


@pytest.mark.parametrize("model", ["onnx", "exported", "compiled", "uncompiled"])
def test_models_of_other_kinds(server: ServerProcess, model: str) -> None:
    reply = served(server, model).predict(model, "[1.5, 2.5]", content_type="application/json")
    assert (reply.status, reply.text) == (200, "[\n  3.0,\n  5.0\n]")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("onnx", "Succesfully setup ort session"),
        ("compiled", "Compiled model with backend eager, fullgraph True"),
        ("uncompiled", "nonsense is not a supported backend"),
    ],
)
def test_the_models_log_says_how_it_was_loaded(server: ServerProcess, model: str, line: str) -> None:
    served(server, model)
    eventually(lambda: line in server.log("model_log.log"), within=10, what=f'"{line}" in model_log.log')


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("exported_untrusted", "write weightsOnly: false into its model-config.yaml"),
        ("dali", "needs the package nvidia-dali"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(server: ServerProcess, model: str, line: str) -> None:
    assert server.register(f"{model}.mar").status == 500
    eventually(lambda: line in server.log("model_log.log"), within=10, what=f'"{line}" in model_log.log')


def test_a_batch_goes_through_micro_batches(server: ServerProcess) -> None:
    from concurrent.futures import ThreadPoolExecutor

    served(server, "micro")
    with ThreadPoolExecutor(5) as pool:
        replies = list(pool.map(lambda n: server.predict("micro", str(n), content_type="text/plain"), range(5)))
    rows = [reply.json() for reply in replies]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
    assert {row[1].partition("-")[0] for row in rows} == {"preprocess"}
    assert {row[4] for row in rows} == {"postprocess-0"}
    assert sorted((row[2], row[3]) for row in rows) == [(0, 2), (0, 2), (1, 2), (1, 2), (2, 1)]


def test_a_model_is_warmed_up_before_it_is_asked(server: ServerProcess) -> None:
    reply = served(server, "warm").predict("warm", "3", content_type="application/json")
    assert reply.json() == [[1, 2], 3]
    lines = [
        "Warmed up with sample.json",
        "The warm-up with broken.json failed",
        "no file missing.json",
        "no file ../outside",
    ]
    eventually(lambda: all(line in server.log("model_log.log") for line in lines), within=10, what="the log of it")


def test_both_names_of_the_streaming_call(server: ServerProcess) -> None:
    reply = served(server, "stream").predict("stream", b"x")
    assert reply.headers["transfer-encoding"] == "chunked"
    assert reply.text == "one two three"
