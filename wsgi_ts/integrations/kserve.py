"""Model archives as models of KServe's own server.

    kserve.ModelServer(workers=1).start([MarModel("mnist", "mnist.mar")])

Each model has an engine of ours in the server's process: requests are awaited on its event loop, and reach the model in
shared memory. Where TorchServe's image has a wrapper that asks TorchServe over HTTP, nothing is asked here.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kserve
from fastapi import HTTPException
from kserve.errors import InvalidInput

from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.errors import BadRequest, ServerError
from wsgi_ts.integrations.engine import Engine, EngineError

log = logging.getLogger(__name__)

_JSON = "application/json"
#: Said by who has encoded the request for KServe's server, or ours to say.
_NOT_PASSED_ON = frozenset(("content-type", "content-length", "transfer-encoding", "connection", "authorization"))
#: A model that is taken off ends once no request has been under way for so long, in seconds.
_QUIET_S = 1.0
_FIRST_ERROR = 400


class MarModel(kserve.Model):  # type: ignore[misc]  # KServe's package has no types that mypy knows
    """A model archive, served by KServe's server over version 1 and 2 of its protocol, REST and gRPC.

    Args:
        name: name of the model.
        archive: a model archive, or a folder with what is in one, or an address where one can be fetched.
        envelope: how an archive that names no envelope gets requests: `kserve` for version 1, `kservev2` for version 2;
            by default what TS_SERVICE_ENVELOPE says, or `kserve`.
        workers: model workers.
        settings: keys of config.properties.
        **arguments: others of the register call: `batch_size`, `max_batch_delay`, `response_timeout`.

    Raises:
        EngineError: the engine cannot be started, or the model cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        archive: str | Path,
        *,
        envelope: str | None = None,
        workers: int = 1,
        settings: Mapping[str, object] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(name)
        self._archive = str(archive)
        envelope = envelope or os.environ.get("TS_SERVICE_ENVELOPE") or "kserve"
        self._settings = {"service_envelope": envelope, **(settings or {})}
        self._arguments = {"model_name": name, "initial_workers": workers, **arguments}
        self._engine: Engine | None = None
        self._is_attached = False
        self.load()

    def load(self) -> bool:
        """Starts the engine with the model, where it does not run, and waits until a worker is ready.

        Raises:
            EngineError: the engine cannot be started, or the model cannot be loaded.
        """
        if self._engine is None:
            folder = os.environ.get("LOG_LOCATION") or tempfile.gettempdir()
            engine = Engine(self._settings, Path(folder, f"wsgi_ts_{self.name}_{os.getpid()}"))
            try:
                engine.register(self._archive, **self._arguments)
            except ServerError as error:
                engine.stop()
                raise EngineError(f"{self._archive}: {error.message}") from error
            except BaseException:
                engine.stop()
                raise
            self._engine, self._is_attached = engine, False
        self.ready = True
        return True

    def stop(self) -> None:
        """Ends the engine once its requests have ended; KServe's server calls it on its event loop, which goes on."""
        self.ready = False
        engine, self._engine = self._engine, None
        if engine is not None:
            threading.Thread(target=_end, args=(engine, self._is_attached), name=f"end of {self.name}").start()

    async def healthy(self) -> bool:
        """Whether a worker of the model is ready."""
        engine = self._attached()
        reason = await asyncio.to_thread(engine.state)
        if reason or not self.ready:
            return False
        default, versions = engine.routes.versions(self.name)
        return bool(versions[default])

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> Any:
        """Returns the model's answer to a request of version 1, a dictionary, or of version 2, an InferRequest.

        Raises:
            InvalidInput: the model finds the request wrong.
            HTTPException: what else a client of our server would have been told.
        """
        if not isinstance(payload, kserve.InferRequest):
            return await self._ask(":predict", payload, headers)
        answer = await self._ask("/infer", _version_2(payload), headers)
        # The envelope says what the archive is called.
        return kserve.InferResponse.from_rest({**answer, "model_name": self.name})

    async def explain(self, payload: Any, headers: dict[str, str] | None = None) -> Any:
        """Returns the model's explanation, as `predict` does its answer."""
        return await self._ask(":explain", payload, headers, RequestFlag.EXPLAIN)

    async def _ask(self, verb: str, body: Any, headers: Mapping[str, str] | None, flags: int = 0) -> Any:
        engine = self._attached()
        path = f"/v1/models/{self.name}{verb}" if verb.startswith(":") else f"/v2/models/{self.name}{verb}"
        try:
            data = json.dumps(body, default=_text_of).encode()
            call = engine.submit(self._target(engine, flags), _head(path, headers or {}), [data], _JSON.encode())
            try:
                answer = await call.whole()
            finally:
                call.close()
        except BadRequest as error:
            raise InvalidInput(error.message) from None
        except ServerError as error:
            raise HTTPException(error.status, error.message) from None
        if call.status >= _FIRST_ERROR:
            raise HTTPException(call.status, answer.decode("utf-8", "replace"))
        return json.loads(answer)

    def _target(self, engine: Engine, flags: int) -> Target:
        target = engine.routes.version_target(self.name, None, flags=flags)
        if target.error is not None:
            raise target.error
        return target

    def _attached(self) -> Engine:
        """Returns the engine; the first request, which comes on the event loop of all others, attaches it."""
        if self._engine is None:
            raise HTTPException(503, f"The model {self.name} is stopped.")
        if not self._is_attached:
            self._engine.attach()
            self._is_attached = True
        return self._engine


def _end(engine: Engine, is_attached: bool) -> None:
    quiet_since = time.monotonic()
    while is_attached and time.monotonic() - quiet_since < _QUIET_S:
        time.sleep(_QUIET_S / 10)
        if engine.under_way:
            quiet_since = time.monotonic()
    engine.stop()


def _version_2(request: Any) -> dict[str, Any]:
    """Returns a request of version 2 as JSON has it; tensors that came as bytes become numbers."""
    inputs = []
    for each in request.inputs:
        data = each.data if each.data and isinstance(each.data, list) else each.as_numpy().tolist()
        inputs.append({"name": each.name, "shape": list(each.shape), "datatype": each.datatype, "data": data})
    return {"id": request.id, "inputs": inputs} if request.id else {"inputs": inputs}


def _text_of(value: Any) -> str:
    """Returns bytes as JSON takes them; so does our server of gRPC."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"a request of KServe's server has a {type(value).__name__}, which JSON has no form for")


def _head(path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"content-type: {_JSON}"]
    for name, value in headers.items():
        if name.lower() not in _NOT_PASSED_ON and isinstance(value, str):
            lines.append(f"{name}: {' '.join(value.split())}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
