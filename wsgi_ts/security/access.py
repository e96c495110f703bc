"""Who may ask at a listener: the check of tokens and, where there are none, of what browsers say of a request.

An API on loopback is out of reach of other machines, but not of a web page in a browser on this one whose name is made
to mean 127.0.0.1 (DNS rebinding). Such requests name the page's host, so the management API without tokens answers
only requests for this machine. Any page can send it a form, too: what would change something for the page of another
site is refused (`cross_site`).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.errors import CrossSiteRequest, HostNotAllowed, InvalidKey, ServerError
from wsgi_ts.http.head import Head
from wsgi_ts.run_files import RunFiles
from wsgi_ts.security.cross_site import is_cross_site_change
from wsgi_ts.security.tokens import API, INFERENCE, MANAGEMENT
from wsgi_ts.settings.config import Config

#: How often the wall clock is looked at, which may have been set.
_LOOK_EVERY_NS = 1_000_000_000
_BEARER = re.compile(r"Bearer\s+(\S+)")
_AUTHORIZATION = re.compile(rb"(?im)^authorization:[^\r\n]*\r\n")
_PORT = re.compile(r":[0-9]*$")
#: The API description, and what Kubernetes' probes ask, which have no token; pages that hold nothing of the server.
OPEN_PATHS = ("", "/api-description", "/livez", "/readyz", "/startupz", "/console", "/docs")
_INFERENCE_ROOTS = ("predictions", "explanations", "ping", "invocations", "wfpredict", "metrics")
_MANAGEMENT_ROOTS = ("models", "workflows", "token", "v1", "console")


def scope_of(kinds: Collection[str], path: str) -> str | None:
    """Whose token a decoded path takes at a listener of these APIs; None for the API description and the probes.

    Where inference and management share an address, everything that is not clearly inference takes the management
    token.
    """
    path = path.rstrip("/")
    if path in OPEN_PATHS:
        return None
    if "management" not in kinds:
        return INFERENCE
    if path == "/token":
        return API
    return INFERENCE if "inference" in kinds and _is_inference(path) else MANAGEMENT


def _root_of(path: str) -> str:
    """The first part of a path; "" of one that does not begin with a slash (`OPTIONS *`)."""
    return path.split("/", 2)[1] if path.startswith("/") else ""


def _is_inference(path: str) -> bool:
    root, parts = _root_of(path), path.split("/")[1:]
    if root in _INFERENCE_ROOTS or root.lower() == "wfpredict":
        return True
    if root == "v2":
        return parts[1:2] != ["repository"]
    if root == "models":
        return len(parts) == 3 and parts[2] == "invoke"
    if root == "v1":
        return len(parts) == 3 and parts[1] == "models" and parts[2].endswith((":predict", ":explain"))
    return root not in _MANAGEMENT_ROOTS and len(parts) in (2, 3) and parts[-1] == "predict"


class TokenTable:
    """A process's copy of what the supervisor published of the keys. Used from any thread."""

    def __init__(self, run_dir: Path, board: Board) -> None:
        self._path = RunFiles(run_dir).tokens
        self._words = board.words
        self._lock = threading.Lock()
        self._keys: dict[str, dict[str, Any]] = {}
        self._epoch = -1

    @property
    def is_current(self) -> bool:
        """Whether nothing newer was published (one load of a shared word)."""
        return self._words[layout.BOARD_TOKEN_EPOCH] == self._epoch

    def refresh(self) -> bool:
        """Reads the published file again if there is a newer one; returns whether there was."""
        if self.is_current:
            return False
        with self._lock:
            epoch = self._words[layout.BOARD_TOKEN_EPOCH]
            try:
                self._keys = json.loads(self._path.read_text(encoding="utf-8"))
            except OSError:  # nothing is published (any more), or it cannot be read now: no token counts
                self._keys = {}
                return True
            self._epoch = epoch
        return True

    def living(self) -> frozenset[str]:
        """Returns the scopes whose key has not expired."""
        return frozenset(scope for scope, key in self._keys.items() if _is_living(key))

    def next_end(self) -> float:
        """Monotonic time at which the next key expires if the wall clock is not set; infinity for none."""
        now = time.monotonic()
        ends = (key["monotonic_end"] for key in self._keys.values() if key["monotonic_end"] is not None)
        return min((end for end in ends if end > now), default=float("inf"))

    def accepts(self, scope: str, authorization: str) -> bool:
        """Whether the value of an Authorization header carries the living key of a scope. Call `refresh` first."""
        match = _BEARER.fullmatch(authorization)
        key = self._keys.get(scope)
        if match is None or key is None or not _is_living(key):
            return False
        given = hashlib.sha256(match[1].encode("latin-1", "replace")).hexdigest()
        return hmac.compare_digest(given, key["sha256"])


def _is_living(key: Mapping[str, Any]) -> bool:
    """Returns whether a published key has not expired, by either clock."""
    return key["wall_end"] is None or (time.time() < key["wall_end"] and time.monotonic() < key["monotonic_end"])


class Access:
    """Says who may ask at one listener; use `Access.is_limited` first.

    A head that passed is marked, and a client's heads repeat: the next one worded alike costs two comparisons. Heads
    with different tokens are different heads. `refresh` takes all marks back when a key was replaced or has expired.
    """

    def __init__(self, kinds: Collection[str], config: Config, run_dir: Path, board: Board) -> None:
        self._kinds = frozenset(kinds)
        self._tokens = TokenTable(run_dir, board) if config.token_authorization else None
        self._own_name = config.management_address.host.lower()
        self._is_local = config.management_address.is_local
        self._allowed_origin = config.cors_allowed_origin.strip()
        #: First segments of the paths of plugins, and those of the inference API.
        self.plugin_roots: frozenset[str] = frozenset()
        self.inference_roots: frozenset[str] = frozenset()
        self._mark = object()
        self._living: frozenset[str] = frozenset()
        self._look_at_ns = 0

    @staticmethod
    def is_limited(kinds: Collection[str], config: Config) -> bool:
        """Returns whether a listener refuses anybody: the metrics API never does."""
        if config.token_authorization:
            return bool({"inference", "management"} & set(kinds))
        return "management" in kinds and config.management_address.scheme != "unix"

    def refresh(self, now_ns: int) -> None:
        """Looks for new and expired keys; call it before a group of requests, with the monotonic time."""
        tokens = self._tokens
        if tokens is None or (now_ns < self._look_at_ns and tokens.is_current):
            return
        renewed = tokens.refresh()
        living = tokens.living()
        if renewed or living != self._living:
            self._mark = object()
        self._living = living
        self._look_at_ns = int(min(now_ns + _LOOK_EVERY_NS, tokens.next_end() * 1e9))

    def has_admitted(self, head: Head) -> bool:
        """Returns whether this head has passed under the keys that count now."""
        return head.admitted is self._mark and (self._tokens is None or self._tokens.is_current)

    def refusal_of(self, head: Head) -> ServerError | None:
        """Checks a head and marks it if it may pass; else returns what to answer.

        The token of a head that passes is taken out of what handlers get to see of it.
        """
        refusal = self.refusal(head.path, head.environ)
        if refusal is None:
            if self._tokens is not None:
                head.raw = _AUTHORIZATION.sub(b"", head.raw)
            head.admitted = self._mark
        return refusal

    def refusal(self, path: str, environ: Mapping[str, Any]) -> ServerError | None:
        """Checks a request by its decoded path and its headers as WSGI variables."""
        scope = scope_of(self._kinds, path)
        if self.plugin_roots and (root := _root_of(path)) in self.plugin_roots:
            # One in the place of an open page is not open, too.
            is_inference = "inference" in self._kinds and root in self.inference_roots
            scope = INFERENCE if is_inference or "management" not in self._kinds else scope or MANAGEMENT
        if scope is None:
            return None
        if self._tokens is not None:
            self.refresh(time.monotonic_ns())
            if self._tokens.accepts(scope, environ.get("HTTP_AUTHORIZATION", "")):
                return None
            return InvalidKey("Authentication" if scope == API else "Authorization")
        if scope == INFERENCE:
            return None
        if self._is_local and not self._is_this_machine(environ.get("HTTP_HOST", "")):
            return HostNotAllowed()
        return CrossSiteRequest() if is_cross_site_change(environ, self._allowed_origin) else None

    def _is_this_machine(self, host: str) -> bool:
        """Returns whether a Host header names this machine; none at all is no browser's request."""
        name = _PORT.sub("", host).strip("[]").lower()
        if name in ("", "localhost", self._own_name):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False
