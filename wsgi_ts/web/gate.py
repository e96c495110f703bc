"""Plugins that say who may ask, at a listener of a web worker."""

from __future__ import annotations

import socket
from collections.abc import Collection

from wsgi_ts.dataplane.http_facts import client_of
from wsgi_ts.errors import ServerError
from wsgi_ts.http.head import Head
from wsgi_ts.plugins import api
from wsgi_ts.plugins.auth import Decision, Gate
from wsgi_ts.plugins.threads import DaemonThreads
from wsgi_ts.rest.actions import action_of, needs_nobody
from wsgi_ts.rest.plugin_endpoints import first_segment
from wsgi_ts.security.access import Access
from wsgi_ts.security.tls import TlsSocket

#: Actions that are always for a model.
PREDICTIONS = ("predict", "explain")
#: Threads that ask plugins.
THREADS = 8


class GatedAccess:
    """Takes the place of `Access`: checks tokens as that does, and has plugins decide on the rest.

    Args:
        tokens: the check of tokens and of the Host header; None where there is none.
        plugin_roots: first segments of the paths of plugins.

    Attributes:
        threads: ask it what it does not know.
    """

    def __init__(
        self, tokens: Access | None, gate: Gate, kinds: Collection[str], plugin_roots: Collection[str] = ()
    ) -> None:
        self.gate = gate
        self.threads = DaemonThreads(THREADS, "plugin auth")
        self._tokens = tokens
        self._kinds = frozenset(kinds)
        self._plugin_roots = frozenset(plugin_roots)

    def has_admitted(self, head: Head) -> bool:
        """False: plugins are asked for every request, and remember what they have said."""
        return False

    def refusal_of(self, head: Head) -> ServerError | None:
        """Checks the token; returns what to answer, None where plugins are to be asked."""
        if self._tokens is None or self._tokens.has_admitted(head):
            return None
        return self._tokens.refusal_of(head)

    def known(self, head: Head, peer: str, sock: socket.socket, model: str = "") -> Decision | None:
        """The decision that needs no waiting.

        `model` is what a prediction is for whose head names none; "" where its body has yet to say so: then it has to
        be asked for again.
        """
        if needs_nobody(head.path) and first_segment(head.path) not in self._plugin_roots:
            return Decision(None)
        return self.gate.known(*self._question(head, peer, sock, model))

    def decide(self, head: Head, peer: str, sock: socket.socket, model: str = "") -> Decision:
        """Asks the plugins, on one of the threads; arguments as of `known`."""
        return self.gate.decide(*self._question(head, peer, sock, model))

    def _question(self, head: Head, peer: str, sock: socket.socket, model: str) -> tuple[api.Head, str, str | None]:
        headers = {
            name[5:].replace("_", "-").lower(): value for name, value in head.environ.items() if name[:5] == "HTTP_"
        }
        certificate = sock.certificate if isinstance(sock, TlsSocket) else None
        asked = api.Head(head.method, head.path, head.query, headers, client_of(peer)[0], certificate)
        action, named = action_of(self._kinds, head.method, head.path, head.query)
        if named or action not in PREDICTIONS or first_segment(head.path) in self._plugin_roots:
            return asked, action, named
        return asked, action, model or None
