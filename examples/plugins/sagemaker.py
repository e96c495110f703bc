"""What Amazon SageMaker asks a container: `/ping`, `/execution-parameters` and `/invocations`.

The first two answer as TorchServe's SageMaker plugin does, byte for byte. `/invocations` runs the one model that is
registered, or the one that the environment variable SAGEMAKER_MODEL_NAME names.
"""

import json
import os

from wsgi_ts.plugins import EndpointError, endpoint

HEALTHY = b'{\n\t"Status": "Healthy"\n}\n'
MIB = 1024 * 1024
DEFAULT_MAX_BYTES = 6 * MIB


@endpoint("ping")
class Ping:
    def __init__(self):
        self._was_ready = False

    def do_get(self, req, resp, ctx):
        if os.environ.get("SAGEMAKER_MULTI_MODE", "false").lower() != "false":
            if not has_service_file(ctx.config.get("default_service_handler")):
                resp.status = "503 Service file unavailable"
                return "Service file unavailable"
            return HEALTHY
        self._was_ready = self._was_ready or any(
            worker.is_running for model in ctx.models.values() for worker in model.workers
        )
        if not self._was_ready:
            resp.status = "503 Model loading..."
            return "Models are not loaded"
        return HEALTHY


def has_service_file(handler):
    if not handler:
        return False
    file = handler.rpartition(":")[0] or handler
    return os.path.exists(file if ".py" in file else f"{file}.py")


@endpoint("execution-parameters")
class ExecutionParameters:
    def do_get(self, req, resp, ctx):
        most = int(ctx.config.get("max_request_size", DEFAULT_MAX_BYTES))
        parameters = {
            "MaxConcurrentTransforms": int(os.environ.get("NUM_WORKERS", "1")),
            "BatchStrategy": "MULTI_RECORD",
            "MaxPayloadInMB": most // MIB,
        }
        return json.dumps(parameters, indent=2)


@endpoint("invocations")
class Invocations:
    def do_post(self, req, resp, ctx):
        name = os.environ.get("SAGEMAKER_MODEL_NAME")
        if name is None:
            names = list(ctx.models)
            if len(names) != 1:
                raise EndpointError("Set SAGEMAKER_MODEL_NAME: not exactly one model is registered.", 503)
            (name,) = names
        answer = ctx.predict(name, req.bounded_stream.read(), content_type=req.content_type or "")
        for header, value in answer.headers.items():
            resp.set_header(header, value)
        return answer.status, answer.body
