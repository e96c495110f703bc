"""The image handlers, with made-up models: what goes into the model, and what is made of its output."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from wsgi_ts.handlers.bundled.image import ImageClassifier, ImageSegmenter, ObjectDetector
from wsgi_ts.handlers.bundled.vision import VisionHandler
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.testing import MockContext

HANDLERS = [ImageClassifier, ImageSegmenter, ObjectDetector]


def ready(handler: Any, model: Any = None) -> Any:
    handler.device = torch.device("cpu")
    handler.model = model
    return handler


def test_number_lists_are_stacked() -> None:
    tensor = ready(ImageClassifier()).preprocess([{"data": [[1, 2]]}, {"body": [[3.5, 4]]}])
    assert tensor.tolist() == [[[1.0, 2.0]], [[3.5, 4.0]]]


@pytest.mark.parametrize("handler_class", HANDLERS)
@pytest.mark.parametrize("image", [b"not an image", bytearray(b"x"), "bm90IGFuIGltYWdl"])
def test_without_the_image_packages_the_error_says_what_to_install(
    handler_class: Any, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=rf"{handler_class.__name__} needs the package pillow.*install it"):
        ready(handler_class()).preprocess([{"body": image}])


@pytest.mark.parametrize("handler_class", HANDLERS)
def test_without_torchvision_the_error_says_so(handler_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ImportError, match=rf"{handler_class.__name__} needs the package torchvision"):
        ready(handler_class()).image_processing(None)


def test_the_classifier_answers_with_its_likeliest_classes() -> None:
    handler = ready(ImageClassifier())
    handler.mapping = {"0": "cat", "1": "dog", "2": "cow"}
    handler.set_max_result_classes(2)
    assert handler.get_max_result_classes() == 2
    (answer,) = handler.postprocess(torch.tensor([[1.0, 3.0, 2.0]]))
    assert list(answer) == ["dog", "cow"]
    assert answer["dog"] == pytest.approx(0.6652, abs=1e-4)
    handler.set_max_result_classes(10)
    assert len(handler.postprocess(torch.tensor([[1.0, 3.0, 2.0]]))[0]) == 3


def test_the_classifier_serves_a_batch() -> None:
    handler = ready(ImageClassifier(), torch.nn.Flatten())
    answers = handler.handle([{"data": [[0.0], [9.0]]}, {"data": [[9.0], [0.0]]}], MockContext())
    assert [next(iter(answer)) for answer in answers] == ["1", "0"]


def test_the_segmenter_answers_with_class_and_probability_per_pixel() -> None:
    output = torch.zeros(1, 3, 2, 2)
    output[0, 2, 0, 1] = 100
    (answer,) = ready(ImageSegmenter()).postprocess({"out": output})
    assert answer[0][1] == [2.0, 1.0]
    assert answer[1][0] == pytest.approx([0.0, 1 / 3])


def test_the_detector_answers_with_the_likely_objects() -> None:
    found = {
        "boxes": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
        "labels": torch.tensor([1, 0]),
        "scores": torch.tensor([0.75, 0.25]),
    }
    handler = ready(ObjectDetector())
    assert handler.postprocess([found]) == [[{"1": [1.0, 2.0, 3.0, 4.0], "score": 0.75}]]
    handler.mapping = {"0": "cat", "1": "dog"}
    assert handler.postprocess([found])[0][0]["dog"] == [1.0, 2.0, 3.0, 4.0]
    handler.threshold = 0.75
    assert [object["score"] for object in handler.postprocess([found])[0]] == [0.75]


def test_explanations_need_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(PredictionException, match="An explanation needs the package captum"):
        ready(ImageClassifier()).get_insights(torch.zeros(1), None, 0)


def test_the_detector_takes_images_of_different_sizes() -> None:
    class Sizes(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            rows = [torch.tensor([[0.0, 0.0, *image.shape[1:]]]) for image in images]
            return [{"boxes": row, "labels": torch.tensor([7]), "scores": torch.tensor([1.0])} for row in rows]

    small, wide = [[[0.0]]], [[[0.0, 0.0]]]
    for images in ([small, small], [small, wide]):
        answers = ready(ObjectDetector(), Sizes()).handle([{"body": image} for image in images], MockContext())
        widths = [answer[0]["7"][3] for answer in answers]
        assert widths == [len(image[0][0]) for image in images]


@pytest.mark.parametrize(("given", "target"), [(bytearray(b"3"), 3), ("[1, 2]", [1, 2]), (5, 5), (None, 0), (b"", 0)])
def test_the_class_to_explain(given: Any, target: Any) -> None:
    handler = ready(ImageClassifier())
    handler.get_insights = lambda tensor, raw, wanted: wanted
    assert handler.explain_handle(None, [{"data": b"x", "target": given}]) == target


def test_a_class_that_is_no_number_is_the_clients_fault() -> None:
    with pytest.raises(PredictionException, match="target is not the number") as caught:
        ready(ImageClassifier()).explain_handle(None, [{"data": b"x", "target": "cat"}])
    assert caught.value.error_code == 400


class Bare(VisionHandler):
    """As handlers of users often are: without a call of the base class's `__init__`."""

    def __init__(self) -> None:
        self.seen = 0


def test_a_vision_handler_needs_image_processing_only_where_it_is_used() -> None:
    handler = ready(Bare())
    assert handler.preprocess([{"data": [[1.0]]}]).tolist() == [[[1.0]]]
    with pytest.raises(NotImplementedError, match=r"Bare cannot turn an image .* define the method image_processing"):
        handler.image_processing(None)
    handler.image_processing = lambda image: "made"
    assert handler.image_processing(None) == "made"


def test_explanations_come_from_ig_also_without_our_init(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gradients:
        def __init__(self, model: Any) -> None:
            self.model = model

        def attribute(self, images: torch.Tensor, target: Any, n_steps: int) -> torch.Tensor:
            scaled: torch.Tensor = images * target
            return scaled

    monkeypatch.setattr("wsgi_ts.handlers.bundled.vision.load_for_explanation", lambda name: Gradients)
    handler = ready(Bare(), "the model")
    assert handler.get_insights(torch.ones(1), None, 3) == [3.0]
    assert handler.ig.model == "the model"
    assert handler.ig is handler.ig


@pytest.mark.parametrize("profile", [True, False])
def test_the_phases_are_measured_where_the_yaml_says_so(profile: bool) -> None:
    context = MockContext()
    context.model_yaml_config = {"handler": {"profile": profile}}
    ready(ImageClassifier(), torch.nn.Flatten()).handle([{"data": [[0.0], [9.0]]}], context)
    names = {metric.name for metric in context.metrics.store} - {"HandlerTime"}
    phases = {"ts_handler_preprocess", "ts_handler_inference", "ts_handler_postprocess"}
    assert names == (phases if profile else set())
