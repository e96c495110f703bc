"""Bytes that a process holds for its clients, against one limit for all of them together.

A limit for each client alone is none: whoever opens more connections gets more.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Client = TypeVar("Client", bound=Hashable)


class Ledger(Generic[Client]):
    """Who holds how much.

    Args:
        limit: bytes that all together should not exceed.

    Attributes:
        total: bytes that all hold now.
    """

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._limit = limit
        self._held: dict[Client, int] = {}

    @property
    def is_exceeded(self) -> bool:
        """Whether all together hold more than the limit."""
        return self.total > self._limit

    def __contains__(self, client: Client) -> bool:
        return client in self._held

    def note(self, client: Client, held: int) -> None:
        """Notes that a client holds so many bytes now; with 0 it is forgotten."""
        self.total += held - self._held.pop(client, 0)
        if held:
            self._held[client] = held

    def largest(self) -> Client:
        """Returns who holds most.

        Raises:
            ValueError: nobody holds anything.
        """
        return max(self._held, key=self._held.__getitem__)
