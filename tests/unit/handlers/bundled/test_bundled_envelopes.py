"""Every bundled handler behind every envelope: what each wraps up is what the handler answers without one."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import support.torchvision_cpu.sitecustomize  # noqa: F401  lets an ill-matched torchvision be imported
from PIL import Image
from support.engines import engine_files

from wsgi_ts.handlers.bundled import densenet
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.service import Service

CLASSIFIER = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 6, bias=False)
        self.linear.weight = torch.nn.Parameter(torch.arange(18.0).reshape(6, 3) / 18)

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
        box = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        return [{"boxes": box, "labels": torch.tensor([1]), "scores": image[:1].mean().reshape(1)} for image in images]
"""
BAG = """
import torch

class Bag(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(3, 2, mode="sum")
        self.embedding.weight = torch.nn.Parameter(torch.tensor([[0, 0], [0, 1], [1, 0.0]]))

    def forward(self, text, offsets):
        return self.embedding(text, offsets)
"""
DOUBLE = """
import torch

class Double(torch.nn.Module):
    def forward(self, x):
        return x * 2.0
"""


def picture(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (260, 256), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


#: For DALI's stand-in, which makes two numbers of an image.
PAIRS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 6, bias=False)
        self.linear.weight = torch.nn.Parameter(torch.arange(12.0).reshape(6, 2) / 1200)

    def forward(self, pairs):
        return self.linear(pairs)
"""
#: The model-config.yaml of those that need one.
CONFIGS = {
    "dali_image_classifier": "dali: {num_threads: 2}",
    "trt_llm_handler": "handler: {engine_dir: e, kv_cache_config: {free_gpu_memory_fraction: 0.1}}",
    "vllm_handler": "handler: {model_path: letters}",
}
#: The stand-ins of those that run a language model on an engine.
ENGINES = {"trt_llm_handler": "tensorrt_llm", "vllm_handler": "vllm"}

#: As base64 text, and as numbers: two inputs of each, of the same shape.
FILES = [picture("red"), picture("black")]
NUMBERS = [[[[0.75, 0.5]], [[0.5, 0.25]], [[0.0, 1.0]]], [[[0.25, 0.0]], [[0.5, 0.5]], [[1.0, 0.5]]]]
VECTORS = [[1.5, 2.0], [0.25, -1.0]]
TEXTS = ["good", "bad bad"]
PROMPTS = ['{"prompt": "ab", "max_tokens": 3}', '{"prompt": "z", "max_tokens": 2}']

#: Handler, its model, inputs, and whether its results are tensors of numbers.
CASES = {
    "classifier-files": ("image_classifier", CLASSIFIER, FILES, False),
    "classifier-numbers": ("image_classifier", CLASSIFIER, NUMBERS, False),
    "densenet-files": ("densenet_handler", CLASSIFIER, FILES, False),
    "densenet-numbers": ("densenet_handler", CLASSIFIER, NUMBERS, False),
    "segmenter-numbers": ("image_segmenter", SEGMENTER, NUMBERS, True),
    "detector-files": ("object_detector", DETECTOR, FILES, False),
    "detector-numbers": ("object_detector", DETECTOR, NUMBERS, False),
    "text": ("text_classifier", BAG, TEXTS, False),
    "base-numbers": ("base_handler", DOUBLE, VECTORS, True),
    "dali-files": ("dali_image_classifier", PAIRS, FILES, False),
    "trt_llm": ("trt_llm_handler", "", PROMPTS, False),
}
#: Those that are asked for explanations, too.
EXPLAINED = ["classifier-numbers", "densenet-numbers", "text"]

Load = Callable[..., Service]


@pytest.fixture
def load(load_model: Load, monkeypatch: pytest.MonkeyPatch, dali: None) -> Load:
    """Loads a bundled handler, without an envelope or behind one."""

    def load(handler: str, model: str, envelope: str | None = None) -> Service:
        # The module keeps one for its process, and a process serves one model.
        monkeypatch.setattr(densenet, "_service", densenet.DenseNetHandler())
        files = {"model.py": model, "source_vocab.json": '["<unk>", "good", "bad"]', "p.dali": ""}
        files["model-config.yaml"] = CONFIGS.get(handler, "")
        if handler in ENGINES:
            files |= engine_files(ENGINES[handler])
        manifest = {"model": {"modelName": "m", "modelVersion": "1.0", "modelFile": "model.py"}}
        return load_model(
            handler,
            files,
            manifest=manifest,
            envelope=envelope,
            config_file="model-config.yaml",
            async_communication=handler in ENGINES,
        )

    return load


def ask(service: Service, rows: list[dict[str, Any]], explain: bool = False) -> list[Any]:
    """The service's answers to a batch, parsed where they are JSON."""
    headers = {"explain": str(explain), "url_path": "v1/completions"}
    answers = service.predict([Request(f"id-{number}", row, headers) for number, row in enumerate(rows)])
    assert not any(answer.error for answer in answers), [bytes(answer.body) for answer in answers]
    # Sums over batches of different sizes differ in their last digits.
    return [parsed(bytes(answer.body)) for answer in answers]


def parsed(body: bytes) -> Any:
    try:
        return json.loads(body, parse_float=lambda text: round(float(text), 5))
    except ValueError:
        return body.decode()


def flat(value: Any) -> list[Any]:
    return [each for item in value for each in flat(item)] if isinstance(value, list) else [value]


def output(name: str, result: Any, is_numbers: bool) -> dict[str, Any]:
    """The tensor of the protocol that a result becomes: what is no number is an element as it is."""
    data = flat(result)
    kind = "FP64" if is_numbers or not data else "BYTES"
    return {"name": name, "shape": [len(data)], "datatype": kind, "data": data}


def tensor(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}
    shape, inner = [], value
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0]
    return {"name": name, "shape": shape, "datatype": "FP32", "data": flat(value)}


@pytest.mark.parametrize(
    ("name", "explain"), [*((name, False) for name in CASES), *((name, True) for name in EXPLAINED)]
)
def test_a_handler_behind_each_envelope(load: Load, name: str, explain: bool) -> None:
    handler, model, inputs, is_numbers = CASES[name]
    is_numbers = is_numbers or (explain and name != "text")
    plain = ask(load(handler, model), [{"data": value} for value in inputs], explain)
    assert plain[0] != plain[1], "answers that say nothing"

    assert ask(load(handler, model, "body"), [{"body": value} for value in inputs], explain) == plain

    service = load(handler, model, "json")
    for instances in (inputs, [{"data": value} for value in inputs]):
        assert ask(service, [{"body": {"instances": instances}}], explain) == [{"predictions": plain}]
    if inputs is FILES:
        files = [{"b64": value} for value in inputs]
        assert ask(service, [{"body": {"instances": files}}], explain) == [{"predictions": plain}]

    service, key = load(handler, model, "kserve"), "explanations" if explain else "predictions"
    for instances in (inputs, [{"data": value} for value in inputs]):
        one = [{"body": {"instances": instances[:1]}}]
        assert ask(service, one, explain) == [{key: plain[:1]}]
        more = [{"body": json.dumps({"instances": instances}).encode()}, {"body": {"instances": instances[1:]}}]
        assert ask(service, more, explain) == [{key: plain}, {key: plain[1:]}]

    service = load(handler, model, "kservev2")
    tensors = [tensor("input-0", inputs[0]), tensor("b", inputs[1])]
    outputs = [output("input-0", plain[0], is_numbers), output("b", plain[1], is_numbers)]
    shown = {"model_name": "m", "model_version": "1.0"}
    for count in (1, 2):
        answer = {"id": "mine", **shown, "outputs": outputs[:count]}
        assert ask(service, [{"body": {"id": "mine", "inputs": tensors[:count]}}], explain) == [answer]
    together = ask(service, [{"body": {"inputs": tensors}}, {"body": {"id": " ", "inputs": tensors[1:]}}], explain)
    assert together == [
        {"id": "id-0", **shown, "outputs": outputs},
        {"id": "id-1", **shown, "outputs": outputs[1:]},
    ]


@pytest.mark.parametrize("envelope", ["body", "json", "kserve", "kservev2"])
def test_openai_s_interface_behind_each_envelope(load: Load, envelope: str) -> None:
    given = {"model": "letters", "prompt": "ab", "max_tokens": 3}
    (plain,) = ask(load("vllm_handler", ""), [{"body": given}])
    assert plain["choices"] == [{"index": 0, "text": "cde"}]
    service = load("vllm_handler", "", envelope)
    if envelope == "body":
        assert ask(service, [{"body": given}]) == ask(service, [{"body": json.dumps(given)}]) == [plain]
    elif envelope == "kservev2":
        inputs = [tensor("a", json.dumps(given)), tensor("b", json.dumps(given))]
        (answer,) = ask(service, [{"body": {"inputs": inputs[:1]}}])
        assert json.loads(answer["outputs"][0]["data"][0]) == plain
        rows = {"body": {"inputs": inputs}}
    else:
        for instance in (given, {"data": given}, json.dumps(given)):
            (answer,) = ask(service, [{"body": {"instances": [instance]}}])
            assert list(map(json.loads, answer["predictions"])) == [plain]
        rows = {"body": {"instances": [given, given]}}
    if envelope != "body":
        (failed,) = service.predict([Request("id", rows, {"url_path": "v1/completions"})])
        assert (failed.status, bytes(failed.body)[:21]) == (400, b"Send one instance or ")


def test_prompts_beside_others_cannot_be_streamed(load: Load) -> None:
    instances = [{"prompt": "a"}, {"prompt": "b", "streaming": True}]
    (answer,) = load("trt_llm_handler", "", "json").predict([Request("id", {"body": {"instances": instances}}, {})])
    assert (answer.status, bytes(answer.body)[:21]) == (400, b"Send one instance or ")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dali-files", {"instances": [[1.0, 2.0]]}),
        ("classifier-numbers", {"instances": [{"picture": "x"}]}),
        ("classifier-numbers", {"instances": [[["x"]]]}),
        ("text", {"instances": [5]}),
    ],
)
def test_an_instance_that_is_no_input_is_the_clients_fault(load: Load, name: str, given: Any) -> None:
    handler, model, _, _ = CASES[name]
    (answer,) = load(handler, model, "kserve").predict([Request("id", {"body": given}, {})])
    assert (answer.status, bytes(answer.body)[:9]) == (400, b"Send the ")
    assert bytes(answer.body).find(b"in each instance or input") > 0


def test_several_texts_in_one_tensor_are_refused_by_handlers_that_answer_one(load: Load) -> None:
    inputs = [{"name": "a", "shape": [2], "datatype": "BYTES", "data": TEXTS}]
    for name in ("text", "classifier-files"):
        handler, model, _, _ = CASES[name]
        (answer,) = load(handler, model, "kservev2").predict([Request("id", {"body": {"inputs": inputs}}, {})])
        assert (answer.status, b"one in each instance or input" in bytes(answer.body)) == (400, True)
