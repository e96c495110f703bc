"""One request, as a handler's service takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Request:
    """One request of a batch, as the handler will see it.

    `function` is the name of the function that is asked, where a workflow's functions share a worker.
    """

    request_id: str
    row: dict[str, Any]
    headers: Mapping[str, Any]
    is_describe: bool = False
    function: str = ""
