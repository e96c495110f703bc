"""Handlers of the gRPC tests' models."""

from __future__ import annotations

#: Says what it was given, and fails, sleeps, or waits for a file as its input says.
SEEN = """
import json, os, time
from ts.utils.util import PredictionException

def handle(data, context):
    if data is None:
        return None
    answers = []
    for index, row in enumerate(data):
        if "fail" in row:
            code = row["fail"].decode()
            if code == "raise":
                raise ValueError("a defect of the handler")
            raise PredictionException("told to fail", int(code))
        if "begun" in row:
            open(row["begun"].decode(), "w").close()
        if "sleep" in row:
            time.sleep(float(row["sleep"].decode()))
        while "gate" in row and not os.path.exists(row["gate"].decode()):
            time.sleep(0.01)
        headers = ("url_path", "explain", "data", "ts_request_sequence_id", "authorization")
        answers.append({
            "row": {key: [type(value).__name__, bytes(value).decode()] for key, value in sorted(row.items())},
            "headers": {key: context.get_request_header(index, key) for key in headers},
            "batch": len(data),
        })
    return [json.dumps(answer) for answer in answers]
"""
ECHO = """
def handle(data, context):
    if data is None:
        return None
    return [bytes(row.get("data") or row.get("body") or b"") for row in data]
"""
#: As tutorials print it, with the words of their client's test.
ECHO_STREAM = """
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if type(data) is list:
        for i in range(4):
            send_intermediate_predict_response(
                ["hello"], context.request_ids, "Intermediate Prediction success", 200, context
            )
        return ["hello world "]
"""
#: Sends as many chunks of a size as it is told, then fails if it is told to.
CHUNKS = """
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    count, size, *fails = data[0]["data"].decode().split()
    for i in range(int(count)):
        send_intermediate_predict_response([b"%0*d" % (int(size), i)], context.request_ids, "ok", 200, context)
    if fails:
        raise ValueError("in the middle of a stream")
    return [b"end"]
"""
#: One word a step until its file is there; counts the requests it has at each step.
STEPS = """
import os, time

class Handler:
    def initialize(self, context):
        self.folder = context.system_properties["model_dir"]

    def handle(self, data, context):
        time.sleep(0.01)
        with open(os.path.join(self.folder, "live"), "w") as file:
            file.write(str(len(data)))
        context.stopping_criteria = [lambda result: False] * len(data)
        return ["step "] * len(data)
"""
COUNTER = """
import json

class Handler:
    def initialize(self, context):
        self.sums = {}

    def handle(self, data, context):
        answers = []
        for index, row in enumerate(data):
            key = context.get_sequence_id(index)
            number = row["data"].decode()
            if number == "bad":
                from ts.utils.util import PredictionException
                raise PredictionException("no number", 400)
            self.sums[key] = self.sums.get(key, 0) + int(number)
            ends = context.get_request_header(index, context.header_key_sequence_end)
            answers.append(json.dumps([key, self.sums[key], ends]))
        return answers
"""
DESCRIBED = """
import json
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        self.context = context
        self.initialized = True

    def describe_handle(self):
        return json.dumps({"says": "hello"})

    def preprocess(self, data):
        return data

    def inference(self, data):
        return data

    def postprocess(self, data):
        return ["x"] * len(data)
"""
#: Gives KServe's tensors back.
KSERVE = """
import json

def handle(data, context):
    if data is None:
        return None
    answers = []
    for row in data:
        body = row["body"]
        outputs = [
            {"name": each["name"], "datatype": each["datatype"], "shape": each["shape"], "data": each["data"]}
            for each in body["inputs"]
        ]
        answers.append(json.dumps({"id": body["id"], "model_name": body["model_name"], "model_version": "1.0",
                                   "outputs": outputs}))
    return answers
"""
