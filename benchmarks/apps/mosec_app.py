"""The models behind mosec; BATCH_SIZE and WAIT_MS (0: mosec's default) come from the environment."""

import os

from mlp import Mlp
from mosec import Runtime, Server, Worker


class Echo(Worker):
    """Answers with the bodies, as they came."""

    batched = int(os.environ["BATCH_SIZE"]) > 1

    def deserialize(self, data):
        """Bytes stay bytes."""
        return bytes(data)

    def serialize(self, data):
        """Bytes stay bytes."""
        return data

    def forward(self, data):
        """One body, or a list of them."""
        return data


class Raw(Echo):
    """Raw float32 in and out."""

    def __init__(self):
        self.model = Mlp()

    def forward(self, data):
        """One pass for the batch."""
        return self.model.raw(data) if self.batched else self.model.raw([data])[0]


class Json(Worker):
    """JSON in and out, by mosec's own serializer."""

    def __init__(self):
        self.model = Mlp()

    def forward(self, data):
        """One pass for the batch."""
        return self.model.lists(data) if Echo.batched else self.model.lists([data])[0]


if __name__ == "__main__":
    server = Server()
    routes = {"/echo": Echo, "/mlp": Raw, "/json": Json}
    batch = {"max_batch_size": int(os.environ["BATCH_SIZE"]), "max_wait_time": int(os.environ["WAIT_MS"])}
    server.register_runtime({route: [Runtime(worker, **batch)] for route, worker in routes.items()})
    server.run()
