"""Who may ask, by plugins: what is remembered, and that nobody gets in where one fails."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from wsgi_ts.plugins.api import Head, Principal, Refuse
from wsgi_ts.plugins.auth import Gate
from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.rest.actions import action_of, needs_nobody
from wsgi_ts.settings.config import Config

ALL = frozenset({"inference", "management", "metrics"})


class Keys:
    """Knows who has which key; counts what it is asked."""

    headers = ("X-Api-Key",)
    cache_s = 60.0
    open_actions = ("ping",)

    def __init__(self) -> None:
        self.asked: list[str] = []

    def authenticate(self, head: Head) -> Principal | Refuse | None:
        self.asked.append("who")
        key = head.headers.get("x-api-key")
        if key == "bad":
            return Refuse(403, "Gone.")
        return Principal(key) if key else None

    def authorize(self, principal: Principal, action: str, model: str) -> bool:
        self.asked.append(f"{action} {model}")
        return principal.name == "admin" or (action, model) == ("predict", "m")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def gate(*plugins: object) -> Gate:
        module = ModuleType("gate_plugins")
        rows = []
        for number, plugin in enumerate(plugins):
            setattr(module, f"p{number}", plugin)
            rows.append(Found(f"p{number}", "auth", f"gate_plugins:p{number}", "test").row())
        monkeypatch.setitem(sys.modules, "gate_plugins", module)
        return Gate(Config(found_plugins=tuple(rows)), PluginReport(tmp_path, "test"))

    return gate


def head(key: str = "", peer: str = "10.0.0.1", **more: str) -> Head:
    return Head("POST", "/predictions/m", "", ({"x-api-key": key} if key else {}) | more, peer)


def status(gate: Gate, asked: Head, action: str = "predict", model: str = "m") -> int:
    refusal = gate.decide(asked, action, model).refusal
    return 200 if refusal is None else refusal.status


def test_decisions(make: Any) -> None:
    gate = make(Keys())
    assert [status(gate, head(key)) for key in ("", "bad", "user", "admin")] == [401, 403, 200, 200]
    assert status(gate, head("user"), "predict", "other") == 403
    assert status(gate, head("admin"), "register", "x") == 200
    assert status(gate, head(), "ping", "") == 200
    refusal = gate.decide(head("user"), "scale", "m").refusal
    assert refusal.to_dict() == {
        **{"code": 403, "type": "AuthorizationException"},
        **{"message": "user is not allowed to ask for this: scale of model m"},
    }


def test_who_asks_is_known_before_the_model(make: Any) -> None:
    keys = Keys()
    gate = make(keys)
    assert [gate.decide(head(key), "predict", None).refusal is None for key in ("", "bad", "user")] == [
        *(False, False, True)
    ]
    assert keys.asked == ["who"] * 3
    assert gate.known(head("user"), "predict", None) is not None and gate.known(head("user"), "predict", "m") is None
    assert status(gate, head("user"), "predict", "other") == 403


def test_what_is_remembered(make: Any) -> None:
    keys = Keys()
    gate = make(keys)
    assert gate.known(head("user"), "predict", "m") is None
    gate.decide(head("user"), "predict", "m")
    assert gate.known(head("user", traceparent="a"), "predict", "m").refusal is None
    assert gate.known(head("user"), "predict", "other") is None
    assert gate.known(head("user", peer="10.0.0.2"), "predict", "m") is None
    gate.decide(head("user"), "predict", "other")
    assert keys.asked == ["who", "predict m", "predict other"]


def test_what_is_remembered_comes_to_an_end(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys()
    gate = make(keys)
    gate.decide(head("user"), "predict", "m")
    now = time.monotonic() + 61
    monkeypatch.setattr("wsgi_ts.plugins.auth.time.monotonic", lambda: now)
    assert gate.known(head("user"), "predict", "m") is None
    gate.decide(head("user"), "predict", "m")
    assert keys.asked == ["who", "predict m"] * 2


def test_several_plugins_are_asked_in_turn(make: Any) -> None:
    class Other(Keys):
        def authenticate(self, head: Head) -> Principal | None:
            return Principal("admin") if "cookie" in head.headers else None

    Other.headers = ("cookie",)
    gate = make(Keys(), Other())
    assert [status(gate, head()), status(gate, head(cookie="a")), status(gate, head("user"))] == [401, 200, 200]


def test_one_that_raises_or_is_missing_lets_nobody_in(make: Any) -> None:
    class Raises(Keys):
        def authorize(self, principal: Principal, action: str, model: str) -> bool:
            raise ValueError("no")

    class Exits(Keys):
        def authenticate(self, head: Head) -> Principal | Refuse | None:
            raise SystemExit(0)

    class SaysNonsense(Keys):
        cache_s = "a while"  # type: ignore[assignment]

    class CannotBeMade(Keys):
        def __init__(self) -> None:
            raise KeyError("JWT_SECRET")

    assert status(make(Raises()), head("user")) == 503
    assert status(make(Exits()), head("admin")) == 503
    assert status(make(Keys(), SaysNonsense()), head("admin")) == 503
    assert status(make(Keys(), CannotBeMade), head("admin")) == 503


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [
        ("POST /predictions/m", ("predict", "m")),
        ("POST /predictions/m/2.0/x", ("predict", "m")),
        ("POST /explanations/m", ("explain", "m")),
        ("OPTIONS /predictions/m", ("describe", "m")),
        ("POST /invocations", ("predict", "")),
        ("POST /invocations?model_name=m", ("predict", "m")),
        ("POST /models/m/invoke", ("predict", "m")),
        ("POST /v1/models/m:explain", ("explain", "m")),
        ("POST /v2/models/m/infer", ("predict", "m")),
        ("POST /m/predict", ("predict", "m")),
        ("POST /predictions", ("predict", "")),
        ("POST /predictions/\u00c3\u00a4", ("predict", "ä")),
        ("GET /ping", ("ping", "")),
        ("GET /metrics", ("metrics", "")),
        ("GET /models", ("describe", "")),
        ("GET /models/m/all", ("describe", "m")),
        ("POST /models?url=m.mar&model_name=m", ("register", "m")),
        ("PUT /models/m?min_worker=2", ("scale", "m")),
        ("PUT /models/m/2.0/set-default", ("scale", "m")),
        ("DELETE /models/m", ("unregister", "m")),
        ("GET /v1/models/m", ("describe", "m")),
        ("POST /wfpredict/w", ("predict", "w")),
        ("POST /workflows?url=w.war&workflow_name=w", ("register", "w")),
        ("DELETE /workflows/w", ("unregister", "w")),
        ("GET /v2/health/live", ("ping", "")),
        ("GET /v2/models/m/ready", ("describe", "m")),
        ("POST /v2/repository/index", ("describe", "")),
        ("POST /v2/repository/models/m/load", ("register", "m")),
        ("POST /v2/repository/models/m/unload", ("unregister", "m")),
        ("GET /plugins", ("describe", "")),
        ("GET /token?type=management", ("other", "")),
        ("GET /anything", ("other", "")),
    ],
)
def test_actions(request_line: str, expected: tuple[str, str]) -> None:
    method, _, target = request_line.partition(" ")
    path, _, query = target.partition("?")
    assert action_of(ALL, method, path, query) == expected


def test_the_api_description_is_everybody_s() -> None:
    assert (
        needs_nobody("/")
        and needs_nobody("/api-description/")
        and needs_nobody("/readyz")
        and not needs_nobody("/models")
    )
