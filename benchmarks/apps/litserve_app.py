"""The models behind LitServe; PORT, BATCH_SIZE, BATCH_TIMEOUT_S and API_SERVERS come from the environment."""

import os
from typing import Annotated

import litserve
from fastapi import Body, Response
from mlp import Mlp


class Echo(litserve.LitAPI):
    """Answers with the bodies, as they came."""

    def setup(self, device):
        """Nothing to load."""

    def decode_request(self, request: Annotated[bytes, Body()]):
        """The raw body."""
        return request

    def batch(self, inputs):
        """A list stays a list."""
        return inputs

    def unbatch(self, output):
        """A list stays a list."""
        return output

    def predict(self, inputs):
        """One body, or a list of them."""
        return inputs

    def encode_response(self, output) -> Response:
        """A raw body."""
        return Response(output, media_type="application/octet-stream")


class Raw(Echo):
    """Raw float32 in and out."""

    def setup(self, device):
        """Makes the model."""
        self.model = Mlp()

    def predict(self, inputs):
        """One pass for the batch."""
        return self.model.raw(inputs) if isinstance(inputs, list) else self.model.raw([inputs])[0]


class Json(litserve.LitAPI):
    """JSON in and out, as LitServe does it by itself."""

    batch = Echo.batch
    unbatch = Echo.unbatch
    setup = Raw.setup

    def decode_request(self, request):
        """What the JSON body holds."""
        return request

    def predict(self, inputs):
        """One pass for the batch."""
        return self.model.lists(inputs) if isinstance(inputs[0], list) else self.model.lists([inputs])[0]

    def encode_response(self, output):
        """The list; LitServe makes JSON of it."""
        return output


if __name__ == "__main__":
    batch = {"max_batch_size": int(os.environ["BATCH_SIZE"]), "batch_timeout": float(os.environ["BATCH_TIMEOUT_S"])}
    routes = {"/echo": Echo, "/mlp": Raw, "/json": Json}
    server = litserve.LitServer(
        [api(api_path=route, **batch) for route, api in routes.items()], accelerator="cpu", timeout=False
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        num_api_servers=int(os.environ["API_SERVERS"]),
        log_level="warning",
        generate_client_file=False,
    )
