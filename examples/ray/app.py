"""A model as a deployment of Ray Serve, and a deployment of ours that calls it: `serve run examples.ray.app:app`."""

from __future__ import annotations

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from wsgi_ts.integrations.ray import deployment


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Party:
    """Greets everybody on a list; the requests go to the model as they come, and it makes batches of them."""

    def __init__(self, greeter: DeploymentHandle) -> None:
        self._greeter = greeter

    async def __call__(self, request: Request) -> list[str]:
        """Returns the greetings, in the order of the names."""
        asked = [self._greeter.predict.remote({"name": name}) for name in await request.json()]
        return [(await answer)["greeting"] for answer in asked]


greeter = deployment("demo/greeter.mar", batch_size=8, num_replicas=2, ray_actor_options={"num_cpus": 0.1})
app = Party.bind(greeter.bind())
