"""The load of this server at the end of each call, as gRPC's balancers read it (ORCA)."""

from __future__ import annotations

import time

from wsgi_ts.dataplane.server_load import Load, ServerLoad
from wsgi_ts.rpc import messages

#: Its value is an OrcaLoadReport.
_TRAILER = "endpoint-load-metrics-bin"


class LoadReport:
    """The trailer as it is now."""

    def __init__(self, load: ServerLoad) -> None:
        self._load = load
        self._told: Load | None = None
        self._metadata: tuple[tuple[str, bytes], ...] = ()

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Returns what a call ends with beside its status."""
        load = self._load.now(time.monotonic_ns())
        if load is not self._told:
            self._told = load
            report = messages.OrcaLoadReport(
                application_utilization=load.utilization,
                named_metrics=load.named_metrics(),
            )
            self._metadata = ((_TRAILER, report.SerializeToString()),)
        return self._metadata
