"""Models as deployments of Ray Serve."""

from wsgi_ts.integrations.ray.deployment import deployment
from wsgi_ts.integrations.ray.replica import ModelReplica

__all__ = ["ModelReplica", "deployment"]
