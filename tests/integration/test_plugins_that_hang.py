"""Plugins that hang where they begin, or exit wherever they are called: the server starts and serves without them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import pytest
from support.eventually import eventually

from wsgi_ts.plugins.testing import PluginServer

PLUGINS = """
import time
from wsgi_ts.plugins import endpoint, plugin

def hang():
    while True:
        pass

@endpoint("ping")
class HangsWhenMade:
    def __init__(self):
        hang()
    def do_get(self, req, resp, ctx): ...

@endpoint("exits")
def exits(req, resp, ctx):
    raise SystemExit(0)

@endpoint("resource-exits")
class Resource:
    def on_get(self, req, resp):
        raise SystemExit(0)

@endpoint("app-exits")
def app_exits(environ, start_response):
    raise SystemExit(0)

turns = 0

@endpoint("spins", timeout=0.2)
def spins(req, resp, ctx):
    global turns
    while True:
        turns += 1

@endpoint("turns")
def tell_turns(req, resp, ctx):
    return str(turns)

@endpoint("works")
def works(req, resp, ctx):
    return "works"

@plugin("events", name="events-hang-when-made")
class Listener:
    def __init__(self):
        time.sleep(1000)
    def server_started(self): ...

@plugin("events", name="events-exit")
class Exits:
    def model_registering(self, name):
        raise SystemExit(0)
    def model_registered(self, name):
        raise SystemExit(0)

@plugin("events", name="events-hang")
class Hangs:
    def model_registered(self, name):
        time.sleep(1000)

@plugin("metrics", name="sink-exits")
class Sink:
    interval_s = 0.2
    def emit(self, samples):
        raise SystemExit(0)

@plugin("snapshot", name="store-hangs")
class Store:
    def save(self, name, properties):
        raise SystemExit(0)
    def last(self):
        time.sleep(1000)

def layer(app):
    def call(environ, start_response):
        if environ.get("QUERY_STRING") == "exit":
            raise SystemExit(0)
        return app(environ, start_response)
    return call
"""
CONFIG = {"middleware": "hanging:layer", "middleware_all": "true"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginServer]:
    home = tmp_path_factory.mktemp("hanging")
    (home / "hanging.py").write_text(dedent(PLUGINS))
    server = PluginServer(home / "server", home / "hanging.py", config=CONFIG)
    server.start("--enable-model-api")
    yield server
    assert server.stop() == 0


def rows(server: PluginServer) -> dict[str, dict[str, Any]]:
    listed = server.get("/plugins", api="management").json()["plugins"]
    return {f"{row['name']} {row['process'].split()[0]}": row for row in listed}


def test_it_serves_and_says_what_it_does_without(server: PluginServer) -> None:
    assert server.post("/predictions/echo", b"x").body == b"x"
    assert server.get("/ping").json() == {"status": "Healthy"}
    assert server.get("/works").text == "works"
    hung = "Plugin {}: TimeoutError: no end within 20 s; {}"
    assert server.output.count(hung.format("ping", "the server's own answer counts")) == 1
    supervisor = hung.format("events-hang-when-made", "it is left out")
    eventually(lambda: server.output.count(supervisor) >= 1, within=30, what="line of the listener")
    store = f"Configuration: plugin store-hangs ({server.home}/plugins/hanging.py): the last snapshot cannot be read: "
    assert server.output.count(f"{store}no end within 10 s") == 1
    eventually(lambda: rows(server)["store-hangs supervisor"]["errors"] >= 1, within=20, what="count of the store")
    assert (rows(server)["ping web"]["state"], rows(server)["ping web"]["errors"]) == ("failed", 1)


def test_an_endpoint_that_exits_costs_its_request(server: PluginServer) -> None:
    for path in ("/exits", "/resource-exits", "/app-exits"):
        for _ in range(9):  # more than it has threads
            answer = server.get(path)
            assert (answer.status, answer.json()) == (
                500,
                {"code": 500, "type": "SystemExit", "message": "Unknown exception"},
            ), path
        assert server.output.count(f"Plugin {path[1:]}: SystemExit: 0") == 1
        eventually(lambda name=f"{path[1:]} web": rows(server)[name]["errors"] == 9, within=20, what="count")  # type: ignore[misc]


def test_an_endpoint_that_spins_is_ended_when_its_client_is_answered(server: PluginServer) -> None:
    for _ in range(9):  # more than it has threads
        answer = server.get("/spins")
        assert (answer.status, answer.json()["message"]) == (503, 'Endpoint "spins" did not answer within 0.2 s.')

    def is_still() -> bool:
        before = server.get("/turns").text
        time.sleep(0.1)
        return server.get("/turns").text == before != "0"

    eventually(is_still, within=20, what="end of what spins")
    # Each was counted once, and none of its threads is lost.
    eventually(lambda: rows(server)["spins web"]["errors"] == 9, within=20, what="count")
    assert rows(server)["spins web"]["state"] == "loaded"


def test_middleware_that_exits_is_passed_by(server: PluginServer) -> None:
    assert server.post("/predictions/echo?exit", b"x").body == b"x"
    assert server.get("/models?exit", api="management").status == 200
    assert server.post("/predictions/echo", b"x").body == b"x"


def test_listeners_sinks_and_stores_that_exit_or_hang(server: PluginServer) -> None:
    assert server.post("/models?url=echo.mar&model_name=other", api="management").status == 200
    assert server.output.count("Plugin events-exit: SystemExit: 0; the model is registered") == 1
    hangs = "Plugin events-hang: TimeoutError: no end within 10 s; it is told of nothing more until it comes back"
    eventually(lambda: server.output.count(hangs) == 1, within=30, what="line of the listener that hangs")
    # The others are told all the same.
    before = rows(server)["events-exit supervisor"]["errors"]
    assert server.post("/models?url=echo.mar&model_name=another", api="management").status == 200
    eventually(lambda: rows(server)["events-exit supervisor"]["errors"] >= before + 2, within=20, what="both failures")
    assert server.output.count(hangs) == 1, "nobody has waited for it again"
    eventually(lambda: rows(server)["sink-exits supervisor"]["errors"] >= 2, within=20, what="count of the sink")
    assert "Plugin store-hangs: SystemExit: 0; the snapshot is written to a file" in server.output
    assert list((server.home / "logs" / "config").glob("*.cfg"))
