"""The management API: REST's operations and texts over gRPC.

The supervisor decides everything about models; here is only how gRPC says arguments and answers. Calls to it block, so
they run in threads: those that wait for models to load or to end in other ones than those that are answered at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import BadRequest, ModelNotFound, ModelVersionNotFound, ServerError, ServiceUnavailable
from wsgi_ts.models.arguments import RegisterArguments, ScaleArguments, page_arguments
from wsgi_ts.rpc import messages
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.calls import Calls
from wsgi_ts.rpc.codes import Failure, inference_failure
from wsgi_ts.rpc.status import StatusCode
from wsgi_ts.settings.table import settings_of

if TYPE_CHECKING:
    from wsgi_ts.dataplane.descriptions import HandlerDescriptions
    from wsgi_ts.instance.instance import Instance

NAME = f"{messages.MANAGEMENT}.ManagementAPIsService"
#: What a piece of work returns.
Result = TypeVar("Result")
_QUICK_THREADS = 8
_WAITING_THREADS = 32


class Management:
    """The methods of the service."""

    def __init__(self, instance: Instance, control: ControlPlane) -> None:
        self._instance = instance
        self._control = control
        self._may_change = instance.config.enable_model_api
        self._quick = ThreadPoolExecutor(_QUICK_THREADS, thread_name_prefix="management")
        self._waiting = ThreadPoolExecutor(_WAITING_THREADS, thread_name_prefix="management-waiting")
        self._descriptions: HandlerDescriptions | None = None

    def service(self, calls: Calls) -> list[Method]:
        """Returns the methods, for the server."""
        methods = {
            "DescribeModel": (self.describe_model, messages.DescribeModelRequest),
            "ListModels": (self.list_models, messages.ListModelsRequest),
            "RegisterModel": (self.register_model, messages.RegisterModelRequest),
            "ScaleWorker": (self.scale_worker, messages.ScaleWorkerRequest),
            "SetDefault": (self.set_default, messages.SetDefaultRequest),
            "UnregisterModel": (self.unregister_model, messages.UnregisterModelRequest),
        }
        response = messages.ManagementResponse
        return calls.service(NAME, *(Method(name, *method, response) for name, method in methods.items()))

    async def describe_model(self, request: Any, rpc: RpcCall) -> Any:
        """Describes a version, or all; with `customized` in the handler's own words, too."""
        version = request.model_version or None
        asks_handler = request.customized and version != "all"
        try:
            answer = await self.ask("describe_model", QUICK_CALL_S, model_name=request.model_name, version=version)
        except ServerError as error:
            if asks_handler and error.status == ModelNotFound.http_status:
                raise _as_prediction(error) from error
            raise
        if asks_handler:
            (description,) = answer["body"]
            loop = asyncio.get_running_loop()
            said = await loop.run_in_executor(self._waiting, self._ask_handler, description)
            if said is not None:
                description["customizedMetadata"] = said
        return _json(answer)

    async def list_models(self, request: Any, rpc: RpcCall) -> Any:
        """Lists the default versions, a page at a time."""
        page = page_arguments(request.limit or None, request.next_page_token)
        return _json(await self.ask("list_models", QUICK_CALL_S, **page))

    async def register_model(self, request: Any, rpc: RpcCall) -> Any:
        """Registers a version."""
        self.refuse_unless_enabled()
        if not request.url:
            raise BadRequest("Parameter url is required.")
        return _status(await self.ask("register_model", **_given(request, RegisterArguments)))

    async def scale_worker(self, request: Any, rpc: RpcCall) -> Any:
        """Sets the number of workers; a version cannot be scaled to none here, as 0 means 1."""
        given = _given(request, ScaleArguments)
        version, least = given.pop("model_version"), given["min_worker"] or 1
        given |= {"min_worker": least, "max_worker": given["max_worker"] or least}
        return _status(await self.ask("scale_model", model_name=request.model_name, version=version, **given))

    async def set_default(self, request: Any, rpc: RpcCall) -> Any:
        """Makes a version the default one."""
        arguments = {"model_name": request.model_name, "version": request.model_version}
        return _status(await self.ask("set_default", QUICK_CALL_S, **arguments))

    async def unregister_model(self, request: Any, rpc: RpcCall) -> Any:
        """Unregisters a version."""
        self.refuse_unless_enabled()
        if not request.model_name:
            raise BadRequest("Parameter url is required.")  # TorchServe's text
        version = request.model_version or None
        return _status(await self.ask("unregister_model", model_name=request.model_name, version=version))

    async def ask(self, operation: str, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Asks the supervisor; see `ControlPlane.call`. Without a `timeout_s` the call may last as long as it likes."""
        pool = self._waiting if timeout_s is None else self._quick
        return await asyncio.get_running_loop().run_in_executor(
            pool, lambda: self._control.call(operation, timeout_s=timeout_s, **arguments)
        )

    async def wait_for(self, work: Callable[[], Result]) -> Result:
        """Does what waits for models, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._waiting, work)

    def refuse_unless_enabled(self) -> None:
        """Lets models be registered and unregistered only with `enable_model_api`.

        Raises:
            Failure: it is off.
        """
        if not self._may_change:
            reason = "org.pytorch.serve.archive.model.ModelException"
            raise Failure(StatusCode.PERMISSION_DENIED, "Model API disabled", reason)

    def _ask_handler(self, description: dict[str, Any]) -> dict[str, Any] | None:
        """What the handler says of its model. On a thread of the pool."""
        if self._descriptions is None:  # two of them would do no harm
            from wsgi_ts.dataplane.descriptions import HandlerDescriptions

            self._descriptions = HandlerDescriptions(self._instance)
        name, version = description["modelName"], description["modelVersion"]
        try:
            return self._descriptions.ask(name, version, description["responseTimeout"])
        except ServiceUnavailable as error:
            raise inference_failure(error) from error


def _as_prediction(error: ServerError) -> Failure:
    """An unknown model in a describe call with `customized`, which is a prediction in disguise."""
    kind = ModelVersionNotFound if error.type_name == ModelVersionNotFound.default_type else ModelNotFound
    return inference_failure(kind(error.message))


def _given(request: Any, table: type) -> dict[str, Any]:
    """The arguments of a call by the table's names; empty texts and numbers up to 0 are None, for the default."""
    given = {name: getattr(request, name) for name in settings_of(table)}
    return {name: value if isinstance(value, bool) or value > type(value)() else None for name, value in given.items()}


def _json(answer: dict[str, Any]) -> Any:
    text = json.dumps(answer["body"], indent=2, ensure_ascii=False)
    return messages.ManagementResponse(msg=text.encode("utf-8", "replace").decode())


def _status(answer: dict[str, Any]) -> Any:
    return messages.ManagementResponse(msg=answer["body"]["status"])
