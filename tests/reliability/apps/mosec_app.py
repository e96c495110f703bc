"""The ledger behind mosec."""

from ledger_handler import Ledger
from mosec import Server, Worker


class LedgerWorker(Worker):
    """Bytes in, bytes out."""

    def __init__(self):
        self.ledger = Ledger()
        self.ledger.initialize(None)

    def deserialize(self, data):
        """Bytes stay bytes."""
        return bytes(data)

    def serialize(self, data):
        """Bytes stay bytes."""
        return data

    def forward(self, data):
        """One body."""
        return self.ledger.answers([data])[0]


if __name__ == "__main__":
    server = Server()
    server.append_worker(LedgerWorker, num=2, route="/ledger")
    server.run()
