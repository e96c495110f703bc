"""The first and the last node of the workflow: from a wave to a tensor, and from likelihoods to a name."""

import io
import json

import torch

NAMES = ("sine", "square", "triangle", "sawtooth")


def pre_processing(data, context):
    """A wave, as a JSON list of 64 numbers, becomes a tensor; called without data once, when it is loaded."""
    if data is None:
        return None
    wave = data[0].get("data") or data[0].get("body")
    if isinstance(wave, bytearray | str):  # where the client does not say that it is JSON
        wave = json.loads(wave)
    return [torch.tensor(wave)]


def postprocessing(data, context):
    """Names the most likely kind of wave."""
    if data is None:
        return None
    likelihoods = torch.load(io.BytesIO(data[0]["body"]), weights_only=True)
    best = int(likelihoods.argmax())
    return [{"wave": NAMES[best], "likelihood": round(float(likelihoods[best]), 3)}]
