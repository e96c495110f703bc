"""The functions of the three workflows. Each is called once without data, when it is loaded."""

import json


def sentence(data, context):
    """The first node of the fan-out: the sentence, for both translators."""
    if data is None:
        return None
    return [data[0].get("data") or data[0]["body"].decode()]


def together(data, context):
    """The last node of the fan-out: what both translators have answered, each under its node's name."""
    if data is None:
        return None
    german, french = (json.loads(data[0][node]) for node in ("en_de", "en_fr"))
    return [{"english": german["input"], "german": german["translation"], "french": french["translation"]}]


def only_translation(data, context):
    """Between two models of the chain: what the second one takes out of what the first one answers."""
    if data is None:
        return None
    return [json.loads(data[0]["body"])["translation"]]


def compare(data, context):
    """The end of the chain: the German sentence, and the English one that came of it."""
    if data is None:
        return None
    answer = json.loads(data[0]["body"])
    return [{"german": answer["input"], "english_again": answer["translation"]}]


def split_lines(data, context):
    """A list for each request: the next model gets each line as a request of its own."""
    if data is None:
        return None
    return [[line for line in data[0]["body"].decode().splitlines() if line.strip()]]


def join_lines(data, context):
    """The answers for all lines, in their order."""
    if data is None:
        return None
    return ["".join(json.loads(answer)["translation"] + "\n" for answer in data[0]["body"])]
