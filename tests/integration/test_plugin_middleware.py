"""WSGI middleware and gunicorn's hooks in a real server: what passes them, and what they may not bring down."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
from support.eventually import eventually

from wsgi_ts.plugins.testing import PluginServer
from wsgi_ts.web.middleware import MOST_LATE
from wsgi_ts.web.middleware_limits import THREADS

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
#: Hangs as the query, or a header of a prediction, says.
HANGING = """
import time

def layer(app):
    def call(environ, start_response):
        def start(status, headers, exc_info=None):
            return start_response(status, [*headers, ("x-layer", "passed")])
        how = environ["QUERY_STRING"].rpartition("&")[2] or environ.get("HTTP_X_HANG", "")
        hang(how, "before")
        answer = app(environ, start)
        hang(how, "after")
        return answer
    return call

def hang(how, when):
    kind, _, moment = how.partition("-")
    if moment != when:
        return
    while kind == "busy":
        pass
    while kind == "stubborn":
        try:
            time.sleep(3600)
        except BaseException:
            break
    if kind == "sleep":
        time.sleep(3600)

layer.timeout_s = LIMIT
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
    eventually(lambda: server.output.count("Plugin second: ValueError") == 2, within=20)  # "before" and "after"


def test_one_that_cannot_be_made_is_left_out(server: PluginServer) -> None:

    def states() -> list[str]:
        rows = server.get("/plugins", api="management").json()["plugins"]
        return [row["state"] for row in rows if row["name"] == "broken"]

    eventually(lambda: states() == ["failed", "failed"], within=20, what="state of what cannot be made")
    eventually(lambda: "RuntimeError: cannot be made; requests pass without it" in server.output, within=20)


def test_gunicorn_calls_hooks_and_keeps_what_is_the_servers(server: PluginServer) -> None:
    eventually(lambda: len(list(server.home.glob("post_fork.*"))) == 2, within=20, what="a hook in each web worker")
    for told in (
        *(f"gunicorn_config: {name} in" for name in ("bind", "worker_class", "workers")),
        "Plugin gunicorn_config: ValueError: not ready at all; gunicorn goes on without its when_ready",
        "worker_exit: Value must have an arity of: 2",
    ):
        eventually(lambda told=told: told in server.output, within=20, what=told)


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


def _row(server: PluginServer, name: str) -> dict[str, object]:
    """What is said of a plugin in the web worker of the inference API."""
    rows = server.get("/plugins", api="management").json()["plugins"]
    [row] = [row for row in rows if row["name"] == name and "inference" in row["process"]]
    return dict(row)


def _hanging(home: Path, limit_s: int, **config: str) -> PluginServer:
    (home / "hanging.py").write_text(HANGING.replace("LIMIT", str(limit_s)))
    server = PluginServer(home / "server", home / "hanging.py", config={"middleware": "hanging:layer", **config})
    server.start()
    return server


def test_one_that_hangs_is_left_out_for_the_request(tmp_path: Path) -> None:
    server = _hanging(tmp_path, 6)
    try:
        assert server.get("/ping").headers["x-layer"] == "passed"
        hung = server.get("/ping?sleep-before")
        assert hung.status == 200 and "x-layer" not in hung.headers
        # What it has let pass before it hung is done once.
        path = "/models?url=echo.mar&model_name=once&initial_workers=0&sleep-after"
        registered = server.post(path, api="management")
        assert registered.status == 200 and "registered" in registered.json()["status"]
        # A call that takes longer than the layer may is none of its time.
        slow = server.post("/models?url=echo.mar&model_name=slow&initial_workers=1&synchronous=true", api="management")
        assert slow.status == 200 and slow.headers["x-layer"] == "passed"
        # All its threads hang: nobody waits for it any more.
        with ThreadPoolExecutor(THREADS) as clients:
            others = clients.map(lambda _: server.get("/ping?sleep-before").status, range(THREADS - 1))
            assert set(others) == {200}
        assert server.get("/ping?sleep-before").status == 200
        passed = server.get("/ping")
        assert passed.status == 200 and "x-layer" not in passed.headers
        eventually(lambda: _row(server, "layer")["errors"] == THREADS, within=20, what="count of those given up")
        assert server.output.count("Plugin layer: no end within 6 s; the request passes without it") <= 2
        counted = f'ts_plugin_errors_total{{plugin="layer",}} {THREADS + 1}.0'  # and that of the management API
        eventually(lambda: counted in server.get("/metrics", api="metrics").text, within=20)
    finally:
        server.stop()


def test_one_that_hangs_on_predictions_holds_nobody_up(tmp_path: Path) -> None:
    # The longest limit that predictions can have: none of those that do not hang may meet it, on a busy machine either.
    server = _hanging(tmp_path, 1, middleware_all="true")
    try:

        def predict(how: str = "") -> str:
            answer = server.post("/predictions/echo", b"x", headers={"x-hang": how})
            assert (answer.status, answer.body) == (200, b"x")
            return answer.headers.get("x-layer", "without")

        assert predict() == "passed"
        for how in ("sleep-before", "busy-before", "sleep-after", "busy-after"):
            assert predict(how) == "without"
            assert predict() == "passed"
        # One that catches its end comes to one all the same.
        assert predict("stubborn-before") == "passed"
        eventually(lambda: _row(server, "layer")["errors"] == 4, within=20, what="count of those that were late")
        for _ in range(MOST_LATE):
            predict("sleep-before")
        assert predict("sleep-before") == predict() == "without"
        eventually(lambda: _row(server, "layer")["state"] == "off", within=20, what="state of the layer")
        assert _row(server, "layer")["errors"] == 4 + MOST_LATE
        assert "Plugin layer: no end within 1 s, 3 times; predictions pass without it for 60 s" in server.output
        assert "web worker" not in server.output.partition("Model server started")[2]
        # All else passes it as before.
        assert server.get("/ping").headers["x-layer"] == "passed"
    finally:
        assert server.stop() == 0
