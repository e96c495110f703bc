"""Who may ask, where plugins of the group `auth` decide: what they have said is remembered for a moment.

A plugin that raises or does not answer lets nobody in: its requests get 503.
"""

from __future__ import annotations

import threading
import time
from dataclasses import field
from functools import partial
from typing import Any

from wsgi_ts.errors import ServerError, ServiceUnavailable
from wsgi_ts.plugins.api import Head, Principal, Refuse
from wsgi_ts.plugins.found import Found, found_in
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import Config

_MOST_KNOWN = 4096
_HEADERS = ("authorization",)
_CACHE_S = 1.0
_TIMEOUT_S = 5.0
_NOBODY_PASSES = "without it nobody is let in"
_NOBODY = Refuse(401, "No credentials that this server accepts.")


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a request is let in: what it is answered with where it is not, and who asks where it is."""

    refusal: ServerError | None
    principal: Principal | None = None


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a plugin says of itself by its attributes."""

    headers: tuple[str, ...]
    open_actions: tuple[str, ...]
    cache_s: float
    timeout_s: float

    @classmethod
    def of(cls, plugin: Any) -> _Terms:
        """Reads them; raises what reading them raises."""
        return cls(
            tuple(name.lower() for name in getattr(plugin, "headers", _HEADERS)),
            tuple(getattr(plugin, "open_actions", ())),
            float(getattr(plugin, "cache_s", _CACHE_S)),
            float(getattr(plugin, "timeout_s", _TIMEOUT_S)),
        )


@dataclass(slots=True)
class _Known:
    """What is remembered for a peer and its headers: until when (monotonic), who it is, and what they may do."""

    until: float
    asker: Principal | Refuse
    plugin: int
    may: dict[tuple[str, str], bool] = field(default_factory=dict)


class Gate:
    """Asks the plugins. `known` is for a thread that must not wait, `decide` for any other."""

    def __init__(self, config: Config, report: PluginReport) -> None:
        self._report = report
        self._plugins: list[tuple[Found, Any]] = []
        terms = []
        for found, plugin in report.instances(config, "auth", _NOBODY_PASSES):
            its = report.begun(found, partial(_Terms.of, plugin), _NOBODY_PASSES)
            if its is not None:
                self._plugins.append((found, plugin))
                terms.append(its)
        # Without one of them nobody knows whom it would have refused.
        self._is_whole = len(self._plugins) == len(found_in(config.found_plugins, "auth"))
        self._headers = sorted({name for each in terms for name in each.headers})
        self._cache_s = min((each.cache_s for each in terms), default=_CACHE_S)
        self.timeout_s = min((each.timeout_s for each in terms), default=_TIMEOUT_S)
        self._open = frozenset(action for each in terms for action in each.open_actions)
        self._lock = threading.Lock()
        self._known: dict[tuple[str, ...], _Known] = {}

    def known(self, head: Head, action: str, model: str | None) -> Decision | None:
        """The decision that was taken a moment ago; None: somebody has to `decide`. Arguments as there."""
        if action in self._open:
            return Decision(None)
        known = self._known.get(self._key(head))
        if known is None or known.until < time.monotonic():
            return None
        return self._decision(known, action, model)

    def decide(self, head: Head, action: str, model: str | None) -> Decision:
        """Asks the plugins.

        `model` is empty where the action is for none; None where the body names it: then only who asks is found out,
        and the decision on the model has to follow.
        """
        decision = self.known(head, action, model)
        if decision is not None:
            return decision
        if not self._is_whole:
            return Decision(_unavailable())
        known = self._known.get(self._key(head))
        if known is None or known.until < time.monotonic():
            known = self._authenticate(head)
            if known is None:
                return Decision(_unavailable())
            with self._lock:
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[self._key(head)] = known
        asker = known.asker
        if isinstance(asker, Principal) and model is not None and (action, model) not in known.may:
            found, plugin = self._plugins[known.plugin]
            try:
                known.may[action, model] = bool(plugin.authorize(asker, action, model))
            except BaseException as error:
                self._report.failed(found, error, instead="the request is refused")
                return Decision(_unavailable())
        return self._decision(known, action, model) or Decision(_unavailable())

    def is_late(self) -> ServerError:
        """A decision was given up: counts it, and returns what the client is told."""
        self._report.failed(
            self._plugins[0][0], f"no decision within {self.timeout_s:g} s", instead="the request is refused"
        )
        return _unavailable()

    def _authenticate(self, head: Head) -> _Known | None:
        """Who asks; None where a plugin fails."""
        until = time.monotonic() + self._cache_s
        for number, (found, plugin) in enumerate(self._plugins):
            try:
                asker = plugin.authenticate(head)
            except BaseException as error:
                self._report.failed(found, error, instead="the request is refused")
                return None
            if isinstance(asker, Principal | Refuse):
                return _Known(until, asker, number)
        return _Known(until, _NOBODY, 0)

    def _decision(self, known: _Known, action: str, model: str | None) -> Decision | None:
        asker = known.asker
        if isinstance(asker, Refuse):
            return Decision(ServerError(asker.text, status=asker.status, type_name="AuthenticationException"))
        if model is None:
            return Decision(None, asker)
        may = known.may.get((action, model))
        if may is None:
            return None
        if may:
            return Decision(None, asker)
        what = f"{action} of model {model}" if model else action
        text = f"{asker.name} is not allowed to ask for this: {what}"
        return Decision(ServerError(text, status=403, type_name="AuthorizationException"))

    def _key(self, head: Head) -> tuple[str, ...]:
        headers = head.headers
        # An authority gives no two certificates the same number (RFC 5280, 4.1.2.2).
        shown = head.certificate
        certificate = f"{shown['serialNumber']} {shown['issuer']}" if shown else ""
        return head.peer, certificate, *[headers.get(name, "") for name in self._headers]


def load_gate(config: Config, report: PluginReport) -> Gate | None:
    """The gate of a process; None where no plugin says who may ask."""
    return Gate(config, report) if config.auth_plugins else None


def _unavailable() -> ServerError:
    return ServiceUnavailable("Who may ask cannot be found out at the moment. Please try again in a few seconds.")
