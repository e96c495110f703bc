"""Plugins in a real server: endpoints of all kinds, what they may not bring down, and the lists that show them."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from textwrap import dedent

import pytest
from openapi_spec_validator import OpenAPIV30SpecValidator
from support.eventually import eventually
from support.http import exchange, request

from wsgi_ts.plugins.testing import PluginServer

COMMAND = [sys.executable, "-c", "import sys; from wsgi_ts.cli.commands import wsgi_ts; sys.exit(wsgi_ts())"]
ENDPOINTS = '''
import os, time
import falcon
from wsgi_ts.plugins import EndpointError, endpoint

@endpoint("kinds")
class Kinds:
    "All that is asked of kinds."

    def __init__(self):
        self.made_in = os.getpid()

    def do_get(self, req, resp, ctx):
        resp.set_header("x-query", req.get_param("a") or "none")
        return {"rest": req.path, "pid": self.made_in, "slots": ctx.config["slots_per_worker"]}

    def do_post(self, req, resp, ctx):
        """Turns a body
        round.

        Whatever it is.
        """
        return 201, req.bounded_stream.read()[::-1]

@endpoint("run")
def run(req, resp, ctx):
    answer = ctx.predict(req.get_param("model"), b"body", timeout=50, content_type="text/plain")
    return answer.status, answer.body

@endpoint("predictions")
class Predictions:
    def do_post(self, req, resp, ctx):
        return "taken over"

@endpoint("raise")
def raising(req, resp, ctx):
    kind = req.get_param("kind")
    raise {"own": EndpointError("not today", 418), "io": OSError("disk"), "memory": MemoryError(),
           "falcon": falcon.HTTPForbidden(description="no")}.get(kind) or ValueError("bad")

@endpoint("hang", timeout=0.3)
def hang(req, resp, ctx):
    while not os.path.exists("go"):
        time.sleep(0.02)
    return "late"

@endpoint("ping", timeout=0.3)
def ping(req, resp, ctx):
    if os.path.exists("gate"):
        os.close(os.open("gate", os.O_RDONLY))  # a FIFO: waits in C for somebody who writes
    return "pong"

@endpoint("resource", type="management")
class Resource:
    def on_get(self, req, resp, rest=""):
        resp.media = {"rest": rest}

    def on_put(self, req, resp, rest=""):
        resp.status = falcon.HTTP_202

@endpoint("models", type="metrics", name="metrics-app")
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield f"{environ['SCRIPT_NAME']}|{environ['PATH_INFO']}|".encode()
    yield environ["wsgi.input"].read()

@endpoint("broken", type="metrics")
def broken(environ, start_response):
    raise RuntimeError("no answer")
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginServer]:
    home = tmp_path_factory.mktemp("plugins")
    (home / "several.py").write_text(dedent(ENDPOINTS))
    (home / "fails.py").write_text("1 / 0\n")
    (home / "old.jar").write_bytes(b"PK")
    server = PluginServer(home / "server", *(home / name for name in ("several.py", "fails.py", "old.jar")))
    server.start()
    yield server
    assert server.stop() == 0


def test_a_class_answers_by_method(server: PluginServer) -> None:
    answer = server.get("/kinds/a/b?a=1")
    assert answer.status == 200 and answer.headers["x-query"] == "1" and answer.headers["x-request-id"]
    said = answer.json()
    assert (said["rest"], said["slots"]) == ("/kinds/a/b", "64")
    assert server.get("/kinds").json()["pid"] == said["pid"]
    posted = server.post("/kinds", b"abc")
    assert (posted.status, posted.body) == (201, b"cba")
    missing = server.request("PUT", "/kinds", b"")
    assert (missing.status, missing.json()["type"]) == (500, "ModelServerEndpointException")
    assert missing.json()["message"] == "No implementation found .. Default implementation invoked"
    assert server.request("PATCH", "/kinds", b"").status == 405


def test_the_api_description_has_them(server: PluginServer) -> None:
    document = server.get("/api-description").json()
    OpenAPIV30SpecValidator(document).validate()
    paths = document["paths"]
    kinds = paths["/kinds"]
    assert {method: row["summary"] for method, row in kinds.items()} == {
        "get": "All that is asked of kinds.",
        "post": "Turns a body round.",
    }
    assert kinds["post"]["description"] == "Turns a body\nround.\n\nWhatever it is."
    assert "requestBody" in kinds["post"] and "requestBody" not in kinds["get"]
    # A function is called for every method.
    assert set(paths["/run"]) == {"get", "post", "put", "delete", "patch"}
    assert paths["/run"]["get"]["summary"] == "Endpoint run of a plugin."
    # What a plugin takes over is described as the plugin's.
    assert set(paths["/predictions"]) == {"post"}
    assert not [path for path in paths if path.startswith("/predictions/")]
    assert "/explanations/{model_name}" in paths
    assert paths["/ping"]["get"]["tags"] == ["plugins"]
    # Each API has its own.
    assert not {"/resource", "/broken"} & set(paths)
    management = server.get("/api-description", api="management").json()
    OpenAPIV30SpecValidator(management).validate()
    assert set(management["paths"]["/resource"]) == {"get", "put"}
    assert "/kinds" not in management["paths"] and "/models" in management["paths"]


def test_an_endpoint_runs_a_model(server: PluginServer) -> None:
    assert server.get("/run?model=echo").body == b"body"
    unknown = server.get("/run?model=none")
    assert (unknown.status, unknown.json()["message"]) == (404, "Model not found: none")


def test_predictions_may_be_taken_over(server: PluginServer) -> None:
    assert server.post("/predictions/echo", b"x").text == "taken over"
    assert server.post("/predictions/unknown/2.0", b"x" * 100_000).text == "taken over"
    assert server.post("/v1/models/echo:predict", b"[1]").status == 200
    assert server.output.count("Requests under /predictions go to a plugin: they have no direct answers") == 1


def test_a_chunked_body_is_whole(server: PluginServer) -> None:
    reply = request(server.ports["inference"], "POST", "/kinds", chunks=[b"ab", b"cd"])
    assert (reply.status, reply.body) == (201, b"dcba")


@pytest.mark.parametrize(
    ("kind", "status", "type_name", "message"),
    [
        ("any", 500, "ValueError", "Unknown exception"),
        ("own", 418, "ModelServerEndpointException", "not today"),
        ("io", 500, "OSError", "I/O error while running the custom endpoint"),
        ("memory", 507, "MemoryError", "Out of memory"),
        ("falcon", 403, "BadRequestException", "no"),
    ],
)
def test_what_an_endpoint_raises(server: PluginServer, kind: str, status: int, type_name: str, message: str) -> None:
    answer = server.get(f"/raise?kind={kind}")
    assert answer.status == status
    assert answer.json() == {"code": status, "type": type_name, "message": message}


def test_a_falcon_resource_and_an_app(server: PluginServer) -> None:
    assert server.get("/resource/a/b", api="management").json() == {"rest": "a/b"}
    assert server.request("PUT", "/resource", b"", api="management").status == 202
    assert server.request("DELETE", "/resource", api="management").status == 405
    mounted = server.post("/models/x", b"body", api="metrics")
    assert (mounted.text, mounted.headers["content-length"]) == ("/models|/x|body", "15")
    failed = server.get("/broken", api="metrics")
    assert (failed.status, failed.json()["message"]) == (500, "Unknown exception")
    # On its own API only.
    assert server.get("/resource").status == 404
    assert server.get("/models", api="management").json()["models"]


def test_one_that_hangs_costs_its_own_requests_only(server: PluginServer) -> None:
    late = server.get("/hang")
    assert (late.status, late.json()["message"]) == (503, 'Endpoint "hang" did not answer within 0.3 s.')
    assert server.get("/kinds").status == 200
    (server.home / "go").touch()
    eventually(lambda: server.get("/hang").text == "late", within=20, what="answer of the endpoint that hung")


def test_where_all_its_threads_hang_the_server_answers_itself(server: PluginServer) -> None:
    gate = server.home / "gate"
    os.mkfifo(gate)
    with ThreadPoolExecutor(8) as clients:
        assert {answer.status for answer in clients.map(lambda _: server.get("/ping"), range(8))} == {503}
    assert server.get("/ping").json() == {"status": "Healthy"}
    eventually(lambda: _rows(server)["ping"]["state"] == "hangs", within=20, what="state of the endpoint")
    eventually(lambda: _rows(server)["ping"]["errors"] == 8, within=20, what="count of those that hung")
    opened = os.open(gate, os.O_WRONLY)
    gate.unlink()
    os.close(opened)
    eventually(lambda: server.get("/ping").text == "pong", within=20, what="the endpoint's own answer")
    eventually(lambda: _rows(server)["ping"]["state"] == "loaded", within=20, what="state of the endpoint")


def _rows(server: PluginServer) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in server.get("/plugins", api="management").json()["plugins"]}


def test_lists_and_counts(server: PluginServer) -> None:
    server.get("/raise")
    eventually(lambda: _rows(server)["raise"]["errors"], within=20, what="count of failures")
    rows = _rows(server)
    assert rows["kinds"] | {"from": ""} == {
        **{"name": "kinds", "version": "", "group": "endpoints", "from": "", "process": "web worker inference"},
        **{"state": "loaded", "errors": 0, "error": ""},
    }
    assert rows["fails"]["state"] == "failed" and rows["fails"]["error"] == "ZeroDivisionError: division by zero"
    assert rows["resource"]["process"] == "web worker management"
    counted = 'ts_plugin_errors_total{plugin="raise",}'
    eventually(lambda: counted in server.get("/metrics", api="metrics").text, within=20, what="its metric")
    listed = subprocess.run(
        [*COMMAND, "plugins", "--json", "--run-dir", str(server.home / "run")], capture_output=True, check=False
    )
    assert listed.returncode == 1
    assert {row["name"] for row in json.loads(listed.stdout)} == set(rows)


def test_what_is_said_at_the_start(server: PluginServer) -> None:
    output = server.output
    assert "Loading plugin for endpoint kinds" in output
    assert "old.jar is a plugin for Java, which this server does not have" in output
    assert "plugin fails" in output and "ZeroDivisionError" in output


def test_many_requests_side_by_side(server: PluginServer) -> None:
    """Plugins and predictions under way together, on connections that are used again."""
    failures: list[object] = []

    def client() -> None:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=60)) as connection:
                for number in range(20):
                    path = "/kinds" if number % 2 else "/v1/models/echo:predict"
                    reply = exchange(connection, "POST", path, body=b"[1]")
                    failures.extend([] if reply.status in (200, 201) else [reply.status])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_upgrade_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(
        "from wsgi_ts.plugins import endpoint\n@endpoint('hello')\ndef f(req, resp, ctx): return 'hello'\n"
    )
    server = PluginServer(tmp_path / "server", tmp_path / "hello.py")
    server.start()
    try:
        flags = ["--ts-config", str(server.home / "config.properties"), "--model-store", str(server.home / "store")]
        done = subprocess.run(
            [*COMMAND, "upgrade", *flags, "--ncs", "--run-dir", str(server.home / "run")],
            capture_output=True,
            check=False,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert server.get("/hello").text == "hello"
    finally:
        server.stop()


def test_a_new_plugin_passes_its_own_test(tmp_path: Path) -> None:
    made = subprocess.run(
        [*COMMAND, "plugin", "new", "endpoint", "say-hello"], cwd=tmp_path, capture_output=True, check=True, text=True
    )
    assert "Wrote" in made.stdout
    folder = tmp_path / "say-hello"
    assert {each.name for each in folder.iterdir()} == {"pyproject.toml", "say_hello.py", "test_say_hello.py"}
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        capture_output=True,
        check=False,
        text=True,
    )
    assert tested.returncode == 0, tested.stdout
    again = subprocess.run([*COMMAND, "plugin", "new", "endpoint", "say-hello"], cwd=tmp_path, check=False)
    assert again.returncode == 1
