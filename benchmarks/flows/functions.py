"""The functions of all workflows of the benchmark: they hand on what they get."""


def pre_processing(data, context):
    """A first node."""
    return None if data is None else [row.get("body") or row.get("data") for row in data]


def postprocessing(data, context):
    """A last node."""
    return None if data is None else [row["body"] for row in data]


def join(data, context):
    """A last node with two parents: the answer of one of them."""
    return None if data is None else [row["left"] for row in data]
