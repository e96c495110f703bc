"""The handler to derive from for images: from base64 text, image files or number lists to one tensor."""

from __future__ import annotations

import base64
import io
from abc import ABC
from functools import cached_property
from typing import Any

import torch

from wsgi_ts.handlers.bundled.base import BaseHandler
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.inputs import content_of
from wsgi_ts.handlers.toolkit.library_names import (
    INTEGRATED_GRADIENTS,
    MAX_IMAGE_PIXELS,
    OPEN_IMAGE,
    import_extra,
    load_for_explanation,
)
from wsgi_ts.handlers.toolkit.phase_times import phase


class VisionHandler(BaseHandler, ABC):
    """Base of the image handlers. A derived class defines or sets `image_processing`, from PIL image to tensor."""

    def image_processing(self, image: Any) -> torch.Tensor:
        """Turns one PIL image into the model's input, a float32 tensor (channels, height, width).

        Raises:
            NotImplementedError: the derived class has not defined it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot turn an image into a tensor: define the method image_processing(image), or "
            "set self.image_processing to a transform in initialize"
        )

    @cached_property
    def ig(self) -> Any:
        """Captum's IntegratedGradients of the model, made when first asked for; may be set to another explanation.

        Raises:
            PredictionException: 501, captum is missing.
        """
        return load_for_explanation(INTEGRATED_GRADIENTS)(self.model)

    def initialize(self, context: Context) -> None:
        """Loads the model; lifts Pillow's limit for huge images where the server says so.

        Raises:
            ImportError: Pillow is missing.
        """
        super().initialize(context)
        if not context.system_properties.get("limit_max_image_pixels", True):
            setattr(import_extra("PIL.Image", type(self).__name__), MAX_IMAGE_PIXELS, None)

    @phase
    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """Stacks the images of a batch.

        Args:
            data: list of B rows with an image in `data` or `body`: a file's bytes, base64 text of one, or nested lists
                of numbers (channels, height, width), which are taken as they are.

        Returns:
            float32 tensor (B, channels, height, width) on the model's device.

        Raises:
            PredictionException: 400, a row has none of these.
            RuntimeError: the images have not all one shape.
        """
        return torch.stack([self._image(row) for row in data]).to(self.device)

    def _image(self, row: Any) -> torch.Tensor:
        image = self._content(row)
        if isinstance(image, (bytes, bytearray)):
            opened = OPEN_IMAGE.load(type(self).__name__)(io.BytesIO(image))
            return self.image_processing(opened)
        try:
            return torch.FloatTensor(image)
        except (TypeError, ValueError) as error:
            raise PredictionException(
                "Send the image as the body or in the form field data, as a file, base64 text or nested lists of "
                f"numbers; one in each instance or input: {error}",
                400,
            ) from error

    def _content(self, row: Any) -> Any:
        """`data` or `body` of a row, or what an envelope made of it; base64 text decoded."""
        image = content_of(row)
        return base64.b64decode(image) if isinstance(image, str) else image

    def get_insights(self, tensor_data: torch.Tensor, _: Any, target: Any = 0) -> Any:
        """Explains predictions by integrated gradients.

        Args:
            tensor_data: images (B, channels, height, width), as `preprocess` returned them.
            target: the class to explain, or a list of B classes.

        Returns:
            Nested lists of the shape of the images: how much each number speaks for the class.

        Raises:
            PredictionException: 501, captum is missing.
        """
        return self.ig.attribute(tensor_data, target=target, n_steps=15).tolist()
