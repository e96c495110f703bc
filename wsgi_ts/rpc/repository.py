"""The model repository of the open inference protocol over gRPC, on the management API's port, as REST has it."""

from __future__ import annotations

from typing import Any

from wsgi_ts.errors import BadRequest
from wsgi_ts.models.repository import ModelRepository
from wsgi_ts.rpc import messages
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.calls import Calls
from wsgi_ts.rpc.management import Management


class Repository:
    """The methods of the service that are about the repository."""

    def __init__(self, models: ModelRepository, management: Management) -> None:
        self._models = models
        self._management = management

    def service(self, calls: Calls, name: str) -> list[Method]:
        """Returns the methods, for the server.

        `name` is one of those that the protocol's service has.
        """
        load = messages.RepositoryModelLoadRequest, messages.RepositoryModelLoadResponse
        unload = messages.RepositoryModelUnloadRequest, messages.RepositoryModelUnloadResponse
        return calls.service(
            name,
            Method("RepositoryIndex", self.index, messages.RepositoryIndexRequest, messages.RepositoryIndexResponse),
            Method("RepositoryModelLoad", self.load, *load),
            Method("RepositoryModelUnload", self.unload, *unload),
        )

    async def index(self, request: Any, rpc: RpcCall) -> Any:
        """Lists the versions that are loaded and the archives that are not; with `ready` only those that are ready."""
        rows = await self._management.wait_for(lambda: self._models.index(only_ready=request.ready))
        return messages.RepositoryIndexResponse(models=rows)

    async def load(self, request: Any, rpc: RpcCall) -> Any:
        """Loads a model, and waits until a worker is ready; one that is loaded stays as it is."""
        self._management.refuse_unless_enabled()
        model = _model_of(request)
        parameters = {
            name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
            for name, value in request.parameters.items()
        }
        await self._management.wait_for(lambda: self._models.load(model, parameters))
        return messages.RepositoryModelLoadResponse(model_name=model, isLoaded=True)

    async def unload(self, request: Any, rpc: RpcCall) -> Any:
        """Unloads all versions of a model, when what waits for them is answered."""
        self._management.refuse_unless_enabled()
        model = _model_of(request)
        await self._management.wait_for(lambda: self._models.unload(model))
        return messages.RepositoryModelUnloadResponse(model_name=model, isUnloaded=True)


def _model_of(request: Any) -> str:
    """The model that a client means: KServe's send its name where those of the protocol send the repository's."""
    name: str = request.model_name or request.repository_name
    if not name:
        raise BadRequest("Parameter model_name is required.")
    return name
