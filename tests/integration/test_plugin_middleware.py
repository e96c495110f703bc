"""WSGI middleware and gunicorn's hooks in a real server: what passes them, and what they may not bring down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from support.eventually import eventually

from wsgi_ts.plugins.testing import PluginServer

LAYERS = """
def _header(app, name):
    def layer(environ, start_response):
        def start(status, headers, exc_info=None):
            return start_response(status, [*headers, (name, "passed")])
        return app(environ, start)
    return layer

def first(app):
    return _header(app, "x-first")

def second(app):
    inner = _header(app, "x-second")
    def layer(environ, start_response):
        if environ["QUERY_STRING"] == "before":
            raise ValueError("before")
        answer = inner(environ, start_response)
        if environ["QUERY_STRING"] == "after":
            raise ValueError("after")
        return answer
    return layer

def broken(app):
    raise RuntimeError("cannot be made")
"""
HOOKS = """
bind = "0.0.0.0:1"
worker_class = "sync"
workers = 9
raw_env = ["FROM_GUNICORN=yes"]

def post_fork(server, worker):
    open(f"post_fork.{worker.pid}", "w").close()

def when_ready(server):
    raise ValueError("not ready at all")

def worker_exit(server):
    '''Has too few arguments.'''
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginServer]:
    home = tmp_path_factory.mktemp("middleware")
    (home / "layers.py").write_text(LAYERS)
    (home / "gunicorn.conf.py").write_text(dedent(HOOKS))
    config = {
        "middleware": "layers:first,layers:second,layers:broken",
        "gunicorn_config": str(home / "gunicorn.conf.py"),
    }
    server = PluginServer(home / "server", home / "layers.py", config=config)
    server.start()
    yield server
    assert server.stop() == 0


def test_all_but_predictions_pass_it(server: PluginServer) -> None:
    for answer in (server.get("/ping"), server.get("/models", api="management"), server.get("/nothing")):
        assert answer.headers["x-first"] == answer.headers["x-second"] == "passed"
    prediction = server.post("/predictions/echo", b"x")
    assert prediction.body == b"x" and "x-first" not in prediction.headers


def test_what_raises_is_left_out_for_the_request(server: PluginServer) -> None:
    before = server.get("/ping?before")
    assert before.status == 200 and "x-second" not in before.headers and before.headers["x-first"] == "passed"
    registered = server.post("/models?url=echo.mar&model_name=again&initial_workers=0&after", api="management")
    assert registered.status == 200
    path = "/models?url=echo.mar&model_name=third&initial_workers=0"
    assert server.request("POST", path, b"", api="management").status == 200
    after = server.request("DELETE", "/models/third?after", api="management")
    assert (after.status, "x-second" in after.headers) == (200, False)
    assert server.output.count("Plugin second: ValueError") == 2  # "before" and "after"


def test_one_that_cannot_be_made_is_left_out(server: PluginServer) -> None:

    def states() -> list[str]:
        rows = server.get("/plugins", api="management").json()["plugins"]
        return [row["state"] for row in rows if row["name"] == "broken"]

    eventually(lambda: states() == ["failed", "failed"], within=5, what="state of what cannot be made")
    assert "RuntimeError: cannot be made; requests pass without it" in server.output


def test_gunicorn_calls_hooks_and_keeps_what_is_the_servers(server: PluginServer) -> None:
    eventually(lambda: len(list(server.home.glob("post_fork.*"))) == 2, within=5, what="a hook in each web worker")
    output = server.output
    for name in ("bind", "worker_class", "workers"):
        assert f"gunicorn_config: {name} in" in output
    assert "Plugin gunicorn_config: ValueError: not ready at all; gunicorn goes on without its when_ready" in output
    assert "worker_exit: Value must have an arity of: 2" in output


def test_predictions_pass_it_where_they_are_to(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text(LAYERS)
    config = {"middleware": "layers:first", "middleware_all": "true"}
    server = PluginServer(tmp_path / "server", tmp_path / "layers.py", config=config)
    server.start()
    try:
        answer = server.post("/predictions/echo", b"x")
        assert (answer.body, answer.headers["x-first"]) == (b"x", "passed")
        assert server.get("/ping").headers["x-first"] == "passed"
        assert server.output.count("predictions pass the middleware, so direct_answers is off") == 1
    finally:
        assert server.stop() == 0
