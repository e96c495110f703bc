"""Greets whoever is named: `{"name": "Ann"}` gives `{"greeting": "Hello, Ann!", "together": 1}`."""

from __future__ import annotations

from typing import Any


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[dict[str, Any]] | None:
    """Answers a batch: `together` says how many requests it had."""
    if data is None:
        return None
    names = [row["body"]["name"] for row in data]
    return [{"greeting": f"Hello, {name}!", "together": len(names)} for name in names]
