"""Token authorization in the apps: `/token`, which renews keys, and the check under servers other than ours."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import TYPE_CHECKING

import falcon

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import InvalidKey
from wsgi_ts.rest.responses import JSON_TYPE
from wsgi_ts.security.access import Access
from wsgi_ts.security.tokens import INFERENCE, MANAGEMENT

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

#: In the environ where the server has checked the token before it called the app.
ADMITTED_KEY = "wsgi_ts.admitted"
_CALL_LIMIT_S = 10.0


class Tokens:
    """`/token?type=management|inference`, with any method, behind the API key."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Replaces a key; the new one is in key_file.json, and in no answer."""
        kind = req.params.get("type")
        if kind not in (MANAGEMENT, INFERENCE):
            raise InvalidKey("Authentication")
        self._control.call("renew_token", timeout_s=_CALL_LIMIT_S, scope=kind)
        resp.set_header("content-type", JSON_TYPE)
        resp.data = b"\n"


class TokenCheck:
    """Falcon middleware: refuses requests without a token where the WSGI server has not done so."""

    def __init__(self, kinds: Collection[str], instance: Instance) -> None:
        # The board is mapped by the process that answers, which may be a fork of this one.
        self._kinds = tuple(kinds)
        self._instance = instance
        self._access: Access | None = None
        self._lock = threading.Lock()

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Checks the request, and hides its token from the handler."""
        if ADMITTED_KEY in req.env:
            return
        refusal = self._open().refusal(req.env["PATH_INFO"], req.env)
        if refusal is not None:
            raise refusal
        req.env.pop("HTTP_AUTHORIZATION", None)

    def _open(self) -> Access:
        with self._lock:
            if self._access is None:
                instance = self._instance
                self._access = Access(self._kinds, instance.config, instance.run_dir, Board.attach(instance.prefix))
            return self._access
