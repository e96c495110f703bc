"""The bundled image handlers: classification, segmentation, object detection."""

from __future__ import annotations

from typing import Any

import torch

from wsgi_ts.handlers.bundled.vision import VisionHandler
from wsgi_ts.handlers.toolkit.library_names import CENTER_CROP, COMPOSE, NORMALIZE, RESIZE, TO_TENSOR
from wsgi_ts.handlers.toolkit.phase_times import phase
from wsgi_ts.handlers.toolkit.utils import map_class_to_label

#: Mean and deviation of ImageNet's colours, which the usual pretrained models expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class TransformingHandler(VisionHandler):
    """Prepares images with a transform of torchvision, by default that of the models pretrained on ImageNet."""

    _transform: Any = None

    def make_transform(self) -> Any:
        """From a PIL image to a float32 tensor (3, 224, 224): 256 pixels, the middle of them, ImageNet's colours.

        Raises:
            ImportError: torchvision is missing.
        """
        purpose = type(self).__name__
        steps = [
            RESIZE.load(purpose)(256),
            CENTER_CROP.load(purpose)(224),
            TO_TENSOR.load(purpose)(),
            NORMALIZE.load(purpose)(mean=IMAGENET_MEAN, std=IMAGENET_DEVIATION),
        ]
        return COMPOSE.load(purpose)(steps)

    def image_processing(self, image: Any) -> torch.Tensor:
        """Turns a PIL image into a tensor (3, height, width), with the transform made at the first call.

        A grey image, or one with transparency, becomes one in three colours: the others fit none of these models.
        """
        if self._transform is None:
            self._transform = self.make_transform()
        tensor: torch.Tensor = self._transform(image.convert("RGB"))
        return tensor


class ImageClassifier(TransformingHandler):
    """Answers each image with its most likely classes and their probabilities."""

    topk = 5

    def set_max_result_classes(self, topk: int) -> None:
        """Sets how many classes an answer has."""
        self.topk = topk

    def get_max_result_classes(self) -> int:
        """Returns how many classes an answer has."""
        return self.topk

    @phase
    def postprocess(self, data: torch.Tensor) -> list[dict[str, float]]:
        """Turns scores (B, classes) into B dicts label -> probability, the likeliest first, `topk` of them."""
        probabilities = torch.nn.functional.softmax(data, dim=1)
        values, classes = torch.topk(probabilities, min(self.topk, probabilities.shape[1]), dim=1)
        return map_class_to_label(values.tolist(), self.mapping, classes.tolist())


class ImageSegmenter(TransformingHandler):
    """Answers each image with the likeliest class and its probability at every pixel."""

    def postprocess(self, data: Any) -> list[Any]:
        """Finds the likeliest class of every pixel.

        Args:
            data: scores (B, classes, height, width), or a dict with them as `out`, as torchvision's models return it.

        Returns:
            Nested lists (B, height, width, 2) of class and probability.
        """
        output = data["out"] if isinstance(data, dict) else data
        values, classes = torch.max(torch.nn.functional.softmax(output, dim=1), dim=1)
        answers: list[Any] = torch.stack([classes.type(values.dtype), values], dim=3).tolist()
        return answers


class ObjectDetector(TransformingHandler):
    """Answers each image with the objects found: label, box and score."""

    threshold = 0.5

    def make_transform(self) -> Any:
        """From a PIL image to a float32 tensor (3, height, width) of values from 0 to 1, without scaling."""
        return TO_TENSOR.load(type(self).__name__)()

    def preprocess(self, data: list[dict[str, Any]]) -> Any:
        """Turns B rows into one float32 tensor (B, 3, height, width).

        Where the sizes differ it is a list of B tensors (3, height, width), which detection models take, too.

        Raises:
            PredictionException: 400, a row has no image.
        """
        images = [self._image(row).to(self.device) for row in data]
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on a tensor (B, 3, height, width) or a list of B tensors (3, height, width)."""
        if isinstance(data, torch.Tensor):
            return super().inference(data, *args, **kwargs)
        with torch.inference_mode():
            return self.model(data, *args, **kwargs)

    def postprocess(self, data: list[dict[str, torch.Tensor]]) -> list[list[dict[str, Any]]]:
        """Keeps the objects whose score is the threshold or more.

        Args:
            data: B dicts of N objects each: `boxes` (N, 4) in pixels, `labels` (N,), `scores` (N,) from 0 to 1.

        Returns:
            B lists of `{label: [x1, y1, x2, y2], "score": score}`, in the model's order: likeliest first.
        """
        return [self._objects(found) for found in data]

    def _objects(self, found: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        keep = found["scores"] >= self.threshold
        boxes = found["boxes"][keep].tolist()
        labels = found["labels"][keep].tolist()
        scores = found["scores"][keep].tolist()
        objects = []
        for box, label, score in zip(boxes, labels, scores, strict=True):
            name = str(label) if self.mapping is None else self.mapping[str(label)]
            objects.append({name: box, "score": score})
        return objects
