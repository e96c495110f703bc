"""Answers each request with what only its own body gives, and notes in a ledger that it was run.

It is what every server of the harness runs: as a model archive, and inside `mosec_app.py` and `litserve_app.py`.
"""

import hashlib
import os
import time


class Ledger:
    """The first 32 bytes of a body are the request's nonce.

    WSGI_TS_LEDGER is the folder of the ledger; WSGI_TS_LEDGER_MS says how long a batch takes, 1 ms if nothing does.
    """

    def initialize(self, context):
        """Opens the ledger, to which each worker appends with one call of the system."""
        path = os.path.join(os.environ["WSGI_TS_LEDGER"], "ledger")
        self.ledger = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.seconds = float(os.environ.get("WSGI_TS_LEDGER_MS", "1")) / 1000

    def answers(self, bodies):
        """The nonce and the hash of each body."""
        for body in bodies:
            os.write(self.ledger, body[:32] + b"\n")
        time.sleep(self.seconds)
        return [body[:32] + hashlib.sha256(body).digest() for body in bodies]

    def handle(self, data, context):
        """As an archive's handler."""
        return self.answers([bytes(row["body"]) for row in data])
