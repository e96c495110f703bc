"""`wsgi-ts explain REQUEST_ID`: the whole story of one slow or failed request."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

from wsgi_ts.cli.status import ANSWER_LIMIT_S, EXIT_NOT_RUNNING
from wsgi_ts.control.client import ControlPlane, NotReachable
from wsgi_ts.errors import ServerError
from wsgi_ts.tracing.explain import explained


def explain(run_dir: Path, request_id: str, *, as_json: bool) -> int:
    """Prints what is kept of a request, or with `as_json` the records.

    Returns:
        The exit status: 0, 1 where nothing is kept, 3 if nothing runs.
    """
    try:
        with closing(ControlPlane(run_dir)) as supervisor:
            story = supervisor.call("explain", timeout_s=ANSWER_LIMIT_S, request_id=request_id)
    except NotReachable:
        print(f"Not running: nothing answers in {run_dir}.", file=sys.stderr)
        return EXIT_NOT_RUNNING
    except ServerError as error:
        print(f"{error.type_name}: {error.message}", file=sys.stderr)
        return 1
    if story is None:
        print(
            f"Nothing is kept of request {request_id}: only the slowest requests of a model in each minute, failed and "
            "sampled ones are, and the last of those (trace_keep, trace_slow_ms).",
            file=sys.stderr,
        )
        return 1
    print(json.dumps(story, indent=2) if as_json else "\n".join(explained(story)))
    return 0
