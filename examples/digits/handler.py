"""The handler of the digits example: an image file comes in, the digit on it goes out.

Loading the weights, putting a batch together and running the model are the base class's work; only what is special to
this model is written here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling

from ts.torch_handler.vision_handler import VisionHandler


class DigitClassifier(VisionHandler):
    """Answers {"digit": the likeliest one, "probability": from 0 to 1}."""

    def image_processing(self, image: Image) -> torch.Tensor:
        """Makes any image an 8x8 grey one, as the model was trained on: light strokes on a dark ground."""
        small = image.convert("L").resize((8, 8), Resampling.BOX)
        return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255.0).unsqueeze(0)

    def postprocess(self, data: torch.Tensor) -> list[dict[str, Any]]:
        """Turns the scores of a batch into one answer per image."""
        probabilities, digits = torch.softmax(data, dim=1).max(dim=1)
        return [
            {"digit": digit, "probability": round(probability, 4)}
            for digit, probability in zip(digits.tolist(), probabilities.tolist(), strict=True)
        ]
