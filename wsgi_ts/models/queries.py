"""What can be asked of models: describe, list, readiness, and the tables of `wsgi-ts status`. Nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wsgi_ts.models.description import describe_version, status_of_version, status_of_worker
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion


class ModelQueries:
    """Answers questions about the models, as `ModelManager` does; `queued` tells how many requests of one wait."""

    def __init__(self, registry: Registry, queued: Callable[[ModelVersion], int]) -> None:
        self._registry = registry
        self._queued = queued

    def describe(self, *, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Describes one version, the default one, or with `all` every one."""
        with self._registry.changed:
            host = self._registry.function_host(model_name)
            if host is not None:
                models = [self._registry.get(host.name, None if version == "all" else version)]
            elif version == "all":
                models = list(self._registry.versions_of(model_name).values())
            else:
                models = [self._registry.get(model_name, version)]
            # Taken here, described without the lock: asking for a GPU's load takes a while.
            found = [(model, list(model.workers.values())) for model in models]
        body = [describe_version(model, workers, self._queued(model)) for model, workers in found]
        if host is not None:
            body = [{**each, "modelName": model_name, "modelUrl": None, "batchSize": 1} for each in body]
        return {"status": 200, "body": body}

    def list_models(self, *, limit: int, next_page_token: int) -> dict[str, Any]:
        """Lists `limit` of the default versions by name, from number `next_page_token` on."""
        end = next_page_token + limit
        models = [model for model in self._registry.default_versions() if not model.spec.functions]
        body: dict[str, Any] = {}
        if end <= len(models):
            body["nextPageToken"] = str(end)
        page = models[next_page_token:end]
        body["models"] = [{"modelName": each.name, "modelUrl": each.directory.url} for each in page]
        return {"status": 200, "body": body}

    def kserve_ready(self, *, model_name: str) -> dict[str, Any]:
        """Whether a model has workers, as KServe asks it."""
        model = self._registry.function_host(model_name) or self._registry.get(model_name)
        return {"status": 200, "body": {"name": model_name, "ready": bool(model.workers)}}

    def status(self) -> dict[str, Any]:
        """The tables `models` and `workers` of `wsgi-ts status`."""
        with self._registry.changed:
            defaults = {(model.name, model.version) for model in self._registry.default_versions()}
            versions = self._registry.all_versions()
            models = [
                status_of_version(model, self._queued(model), is_default=(model.name, model.version) in defaults)
                for model in versions
            ]
            workers = [status_of_worker(model, each) for model in versions for each in model.workers.values()]
        return {"models": models, "workers": workers}
