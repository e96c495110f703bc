"""Ray Serve with the sleeping model, until SIGTERM: `ray_app.py PORT KIND REPLICAS WORKERS`.

KIND is `batch`, Ray's own batching, or `wsgi-ts`.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import ray
from ray import serve
from sleep_handler import handle
from starlette.requests import Request

BATCH = 8
WAIT_S = 0.005
ONGOING = 100


@serve.deployment(max_ongoing_requests=ONGOING, ray_actor_options={"num_cpus": 0.1})
class Batched:
    """The handler as Ray's own batching calls it: a model that computes blocks its replica's event loop."""

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
    async def predict(self, bodies: list[bytes]) -> list[bytes]:
        """Answers a batch."""
        return handle([{"body": body} for body in bodies], None) or []

    async def __call__(self, request: Request) -> bytes:
        """Answers one request."""
        answer: bytes = await self.predict(await request.body())
        return answer


def main() -> None:
    """Serves until it is told to stop."""
    port, kind, replicas, workers = sys.argv[1:]
    ray.init(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, logging_config={"enable_access_log": False})
    if kind == "batch":
        app = Batched.options(num_replicas=int(replicas)).bind()
    else:
        from wsgi_ts.integrations.ray import deployment

        store = Path(sys.argv[0]).parents[1] / ".work" / "model-store"
        app = deployment(
            store / "sleep.mar",
            batch_size=BATCH,
            max_batch_delay=int(WAIT_S * 1000),
            workers=int(workers),
            num_replicas=int(replicas),
            max_ongoing_requests=ONGOING,
            ray_actor_options={"num_cpus": 0.1},
            settings={"preload_modules": ""},
            logging_config={"enable_access_log": False},
        ).bind()
    serve.run(app)
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
