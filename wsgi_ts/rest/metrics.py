"""The metrics API: `/metrics` in Prometheus' text format.

The supervisor has the numbers and writes the text (`wsgi_ts.supervisor.metrics.collector`). In the default mode
(`metrics_mode=log`) the metrics go to the log files, and this answer is empty.
"""

from __future__ import annotations

import falcon

from wsgi_ts.control.client import ControlPlane

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """`/metrics`, with any method; in `metrics_mode` log it is empty."""

    def __init__(self, mode: str, control: ControlPlane) -> None:
        self._in_logs = mode == "log"
        self._control = control

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with all metrics, or those named by `name[]`."""
        resp.set_header("content-type", CONTENT_TYPE)
        text = "" if self._in_logs else self._control.call("metrics", names=req.get_param_as_list("name[]") or None)
        resp.data = text.encode()
