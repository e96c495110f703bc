"""How a client breaks the protocol."""

from __future__ import annotations


class ConnectionFault(Exception):
    """The client has broken the protocol; the connection has to be closed once what it has to send is sent."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
