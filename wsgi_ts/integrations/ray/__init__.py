"""Models as deployments of Ray Serve."""

from wsgi_ts.integrations.ray.deployment import app, deployment
from wsgi_ts.integrations.ray.replica import ModelReplica

__all__ = ["ModelReplica", "app", "deployment"]
