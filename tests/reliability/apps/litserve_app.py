"""The ledger behind LitServe; PORT comes from the environment."""

import os
from typing import Annotated

import litserve
from fastapi import Body, Response
from ledger_handler import Ledger


class LedgerApi(litserve.LitAPI):
    """Bytes in, bytes out."""

    def setup(self, device):
        """Opens the ledger."""
        self.ledger = Ledger()
        self.ledger.initialize(None)

    def decode_request(self, request: Annotated[bytes, Body()]):
        """The raw body."""
        return request

    def predict(self, body):
        """One body."""
        return self.ledger.answers([body])[0]

    def encode_response(self, output) -> Response:
        """A raw body."""
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(
        LedgerApi(api_path="/ledger"), accelerator="cpu", workers_per_device=2, timeout=False, restart_workers=True
    )
    server.run(
        host="127.0.0.1", port=int(os.environ["PORT"]), num_api_servers=2, log_level="warning",
        generate_client_file=False,
    )  # fmt: skip
