"""The handlers of both models: the picture is the first node's answer; for the breed there is the other model's too."""

import io
import json
import os

import numpy as np
import torch
from model import PictureNet
from PIL import Image

ANIMALS = ("cat", "dog")
BREEDS = ("dalmatian", "setter", "poodle")


class PictureHandler:
    """Loads the network of this archive, and runs it on a batch of pictures.

    Which of the two it is says the number of its classes.
    """

    def initialize(self, context):
        torch.set_num_threads(1)
        model_dir = context.system_properties["model_dir"]
        weights = torch.load(os.path.join(model_dir, context.manifest["model"]["serializedFile"]), weights_only=True)
        self.names = ANIMALS if len(weights["head.bias"]) == len(ANIMALS) else BREEDS
        self.network = PictureNet(len(self.names))
        self.network.load_state_dict(weights)
        self.network.eval()

    def handle(self, data, context):
        answers = [None] * len(data)
        to_see = []
        for row, parts in enumerate(data):
            # One parent: its answer is the body. Two: each is called as its node.
            earlier = json.loads(parts["animal"]) if "animal" in parts else None
            if earlier is not None and earlier["animal"] == "cat":
                answers[row] = earlier
            else:
                to_see.append((row, decoded(parts.get("body") or parts["pre_processing"]), earlier))
        if to_see:
            with torch.inference_mode():
                likelihoods = self.network(torch.stack([picture for _, picture, _ in to_see])).softmax(dim=1)
            for (row, _, earlier), likely in zip(to_see, likelihoods, strict=True):
                best = int(likely.argmax())
                found = {"animal" if self.names is ANIMALS else "breed": self.names[best]}
                answers[row] = {**(earlier or {}), **found, "likelihood": round(float(likely[best]), 3)}
        return answers


def decoded(picture):
    """The picture as the network takes it."""
    points = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB").resize((32, 32)))
    return torch.from_numpy(points.copy()).permute(2, 0, 1).float() / 255
