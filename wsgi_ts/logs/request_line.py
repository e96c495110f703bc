"""One request as a line of JSON, by OpenTelemetry's names: what the access log has with `log_format=json`."""

from __future__ import annotations

import json
import time
from typing import Any


def request_line(took_ns: int, **fields: Any) -> str:
    """Returns the line.

    It took `took_ns` from the request's first byte to its answer; of the other fields those are left out that are None.
    """
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    known = {name.replace("__", "."): value for name, value in fields.items() if value is not None}
    return json.dumps({"timestamp": stamp, "duration_ms": round(took_ns / 1e6, 3), **known}, separators=(",", ":"))
