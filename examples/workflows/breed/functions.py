"""The functions of both workflows."""

import json


def pre_processing(data, context):
    """Hands the picture to both models: a workflow has one first node."""
    if data is None:
        return None
    return [bytes(data[0].get("data") or data[0]["body"])]


def is_dog(data, context):
    """Whether the breed is asked for: the node `breed` runs where this is true."""
    if data is None:
        return None
    return [json.loads(data[0]["animal"])["animal"] == "dog"]
