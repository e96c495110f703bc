"""The load of this server in a header of each answer, for proxies that choose by it (ORCA: Envoy, gRPC, gateways).

`endpoint-load-metrics: JSON {"application_utilization":0.5,"named_metrics":{…}}`; gRPC's calls end with the same
(`rpc.load_report`).
"""

from __future__ import annotations

import json

from wsgi_ts.dataplane.server_load import Load, ServerLoad


class LoadHeader:
    """The header line as it is now."""

    def __init__(self, load: ServerLoad) -> None:
        self._load = load
        self._told: Load | None = None
        self._line = b""

    def add_to(self, head: bytes, now_ns: int) -> bytes:
        """Returns the head of an answer with the header.

        The head has its empty line; `now_ns` is monotonic.
        """
        load = self._load.now(now_ns)
        if load is not self._told:
            self._told = load
            named = json.dumps(load.named_metrics(), separators=(",", ":"))
            value = f'{{"application_utilization":{load.utilization:.4g},"named_metrics":{named}}}'
            self._line = f"endpoint-load-metrics: JSON {value}\r\n\r\n".encode()
        return head[:-2] + self._line
