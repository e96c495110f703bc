"""What a server gives away, to whom it listens: one test for each promise."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess, free_ports

from wsgi_ts.process import INSTANCE_VARIABLE

#: Nothing that a client is sent may match: names of ours, paths of this machine, pieces of tracebacks.
LEAKS = re.compile(r'/dev/shm|psm_|sem\.|wsgi-ts-[0-9a-f]{32}|Traceback|File "/|\.py", line|/tmp/|/home/|/proc/')
NOTHING_SAID = {"disable_token_authorization": ""}
CORS = {
    "cors_allowed_origin": "https://app.example.org",
    "cors_allowed_methods": "GET, POST, PUT, OPTIONS",
    "cors_allowed_headers": "Content-Type",
}
FAILING = """
def handle(data, context):
    if data is None:
        return None
    raise RuntimeError("secret /tmp/path in the handler's error")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """No tokens, everything on loopback; a password in the environment."""
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "failing", FAILING)
    archive(store, "broken", "raise ImportError('no such thing in /home/me')")
    config = {"enable_envvars_config": "true", **CORS}
    with ServerProcess(store=store, config=config, environment={"TS_KEYSTORE_PASS": "env secret"}) as running:
        for name in ("echo.mar", "failing.mar"):
            assert running.register(name).status == 200
        yield running


# Network


def test_it_listens_on_loopback_only_and_on_nothing_else(server: ServerProcess) -> None:
    listening = set()
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(process.pid).net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    # gRPC's sockets know both families and show their IPv4 address in IPv6's form.
                    listening.add((connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port))
    assert listening == {("127.0.0.1", port) for port in server.ports.values()}


def test_on_loopback_no_token_is_needed_and_no_key_file_written(
    store: Path, start_server: Callable[..., ServerProcess]
) -> None:
    archive(store, "echo")
    server = start_server(store=store, config={**NOTHING_SAID, "enable_model_api": "", "load_models": "echo.mar"})
    eventually(lambda: server.predict("echo", b"x").status == 200, within=30)
    assert server.predict("echo", b"x").status == 200
    assert server.request("management", "GET", "/models").status == 200
    assert not (server.home / "key_file.json").exists()
    reply = server.request("management", "GET", "/token?type=inference")
    assert (reply.status, reply.json()["type"]) == (404, "ResourceNotFoundException")


def test_where_models_may_be_registered_a_token_is_needed(
    store: Path, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(store=store, config=NOTHING_SAID)
    refused = server.request("management", "GET", "/models")
    assert (refused.status, refused.json()["type"]) == (400, "InvalidKeyException")
    keys = json.loads((server.home / "key_file.json").read_text())
    with_key = {"authorization": f"Bearer {keys['management']['key']}"}
    assert server.request("management", "GET", "/models", headers=with_key).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8081", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8081", 200),
        ("attacker.example", 403),
        ("localhost.attacker.example:8081", 403),
        ("192.0.2.1", 403),
    ],
)
def test_management_answers_requests_for_this_machine_only(server: ServerProcess, host: str, status: int) -> None:
    for method, path in (("GET", "/models"), ("PUT", "/models/echo?min_worker=1")):
        with server.raw("management") as raw:
            raw.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
            line, _, body = raw.read_answer()
            if status == 403:
                assert line.split()[1] == b"403"
                assert json.loads(body)["type"] == "HostNotAllowedException"
            else:
                assert line.split()[1] in (b"200", b"202")
    with server.raw("inference") as raw:
        raw.send(f"GET /ping HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert raw.read_answer()[0].split()[1] == b"200"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("", 202),
        ("Origin: http://{host}\r\n", 202),
        ("Origin: http://{host}\r\nSec-Fetch-Site: same-origin\r\n", 202),
        ("Origin: https://app.example.org\r\nSec-Fetch-Site: cross-site\r\n", 202),  # cors_allowed_origin
        ("Origin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n", 403),
        ("Origin: https://evil.example\r\n", 403),
        ("Origin: null\r\n", 403),
    ],
)
def test_a_page_of_another_site_changes_no_model(server: ServerProcess, said: str, status: int) -> None:
    host = f"127.0.0.1:{server.ports['management']}"
    headers = f"Host: {host}\r\n{said.format(host=host)}Content-Length: 0\r\n\r\n"
    with server.raw("management") as raw:
        raw.send(f"PUT /models/echo?min_worker=1 HTTP/1.1\r\n{headers}".encode())
        line, _, body = raw.read_answer()
    assert int(line.split()[1]) == status
    if status == 403:
        assert json.loads(body)["type"] == "CrossSiteRequestException"
    with server.raw("inference") as raw:
        raw.send(f"POST /predictions/echo HTTP/1.1\r\n{headers}".encode())
        assert raw.read_answer()[0].split()[1] == b"200"


def test_http_1_0_without_host_is_served(server: ServerProcess) -> None:
    with server.raw("management") as raw:
        raw.send(b"GET /models HTTP/1.0\r\n\r\n")
        assert raw.read_answer()[0].split()[1] == b"200"


def test_open_management_without_tokens_is_warned_of_and_cors_is_off_without_keys() -> None:
    (port,) = free_ports(1)
    server = ServerProcess(config={"management_address": f"http://0.0.0.0:{port}"})
    server.ports["management"] = port
    with server:
        with server.raw("management") as raw:
            raw.send(b"GET /models HTTP/1.1\r\nHost: any.example\r\n\r\n")
            assert raw.read_answer()[0].split()[1] == b"200"
        assert f"http://0.0.0.0:{port} answers everybody who can reach it; who manages models" in server.log()
        for api in ("inference", "metrics"):
            reply = server.request(api, "OPTIONS", "/", headers={"Origin": "https://app.example.org"})
            assert reply.status == 200
            assert not [name for name in reply.headers if name.startswith("access-control")]


# CORS


def test_cors_headers_are_those_of_the_keys_on_every_answer(server: ServerProcess) -> None:
    wanted = {
        "access-control-allow-origin": "https://app.example.org",
        "access-control-allow-methods": "GET, POST, PUT, OPTIONS",
        "access-control-allow-headers": "Content-Type",
    }
    for origin in ("https://app.example.org", "https://evil.example", "null"):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        for api, method, path, status in (
            ("inference", "POST", "/predictions/echo", 200),
            ("inference", "OPTIONS", "/predictions/echo", 200),
            ("inference", "OPTIONS", "/", 200),
            ("inference", "GET", "/nothing", 404),
            ("management", "GET", "/models", 200),
            ("management", "OPTIONS", "/models/echo", 200),
            ("metrics", "GET", "/metrics", 200),
        ):
            reply = server.request(api, method, path, headers=headers, body=b"")
            assert reply.status == status, (method, path)
            found = {name: value for name, value in reply.headers.items() if name.startswith("access-control")}
            assert found == wanted


@pytest.mark.parametrize(
    ("api", "path"),
    [
        ("inference", "/predictions/echo"),
        ("inference", "/wfpredict/nothing"),
        ("management", "/models"),
        ("management", "/models/echo/1.0/set-default"),
        ("management", "/workflows/nothing"),
        ("metrics", "/metrics"),
    ],
)
def test_a_preflight_is_answered_on_every_path(server: ServerProcess, api: str, path: str) -> None:
    asked = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "PUT"}
    reply = server.request(api, "OPTIONS", path, headers=asked)
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["access-control-allow-methods"] == "GET, POST, PUT, OPTIONS"
    # Another request of that method is answered as in TorchServe.
    plain = server.request(api, "OPTIONS", path, headers={"Origin": "https://app.example.org"})
    assert plain.body or api == "metrics"


def test_other_options_are_answered_with_the_api_description(server: ServerProcess) -> None:
    reply = server.request("inference", "OPTIONS", "/predictions/echo")
    assert reply.json()["openapi"] == "3.0.1"


# What is given away


def test_no_answer_tells_of_the_inside(server: ServerProcess) -> None:
    requests = [
        ("inference", "POST", "/predictions/failing", b"x"),
        ("inference", "POST", "/predictions/unknown", b"x"),
        ("inference", "POST", "/predictions/echo/9", b"x"),
        ("inference", "GET", "/%00%ff/../../etc/passwd", None),
        ("management", "POST", "/models?url=../../etc/passwd", b""),
        ("management", "POST", "/models?url=file:///etc/passwd", b""),
        ("management", "POST", "/models?url=missing.mar", b""),
        ("management", "POST", "/models?url=broken.mar&initial_workers=1&synchronous=true", b""),
        ("management", "GET", "/models/unknown", None),
        ("management", "PUT", "/models/echo?min_worker=-1", b""),
        ("management", "DELETE", "/models/unknown", None),
        ("metrics", "GET", "/nothing", None),
    ]
    for api, method, path, body in requests:
        reply = server.request(api, method, path, body=body, timeout=90)
        assert reply.status >= 400, path
        text = f"{reply.reason} {dict(reply.headers)} {reply.text}"
        assert not LEAKS.search(text), (path, text)
    for junk in (b"GET\r\n\r\n", b"\0\0\0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 20_000):
        with server.raw() as raw:
            raw.send(junk)
            answer = raw.read_rest()
            assert answer.split()[1][:1] == b"4" and not LEAKS.search(answer.decode("latin-1")), junk[:20]


def test_the_log_at_info_names_no_shared_memory(server: ServerProcess) -> None:
    assert server.predict("failing", b"x").status == 503
    lines = [line for line in server.log().splitlines() if "[DEBUG]" not in line]
    assert lines and not [line for line in lines if server.prefix in line]


def test_the_password_of_the_key_store_stays_with_the_supervisor(server: ServerProcess) -> None:
    roles = set()
    for process in server.processes():
        if process.role not in ("guard", "supervisor"):
            # Those of a model that could not be loaded may just have ended.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                assert b"env secret" not in Path(f"/proc/{process.pid}/environ").read_bytes(), process.role
                roles.add(process.role)
    assert {"web-worker", "batcher", "model-worker"} <= roles
    assert "env secret" not in (server.run_dir / "config.json").read_text()


def test_processes_are_forked_from_the_supervisor_where_it_knows_no_password(
    server: ServerProcess, echo_server: ServerProcess
) -> None:
    def is_forked(of: ServerProcess) -> bool:
        """One that was started by exec has the instance's mark in the environment that it began with."""
        (batcher,) = of.processes("batcher")
        return INSTANCE_VARIABLE.encode() not in Path(f"/proc/{batcher.pid}/environ").read_bytes()

    assert is_forked(echo_server)
    assert not is_forked(server)


# On this machine


def test_what_lies_in_the_file_system_is_private(server: ServerProcess) -> None:
    assert stat.S_IMODE(server.run_dir.stat().st_mode) == 0o700
    for path in server.run_dir.rglob("*"):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # a file on its way to its name
            continue
        if "__pycache__" in path.parts:
            # A model worker's interpreter makes it, inside a folder that nobody else can enter.
            assert "models" in path.parts and not mode & 0o022, path
            continue
        if path.is_dir():
            assert stat.S_IMODE(mode) == 0o700, path
        elif not stat.S_ISLNK(mode):
            assert not mode & (0o7077 if "models" in path.parts else 0o077), path
    names = [name for name in os.listdir("/dev/shm") if server.prefix in name]
    assert names and re.fullmatch(r"wsgi-ts-[0-9a-f]{32}", server.prefix)
    for name in names:
        assert stat.S_IMODE(os.stat(f"/dev/shm/{name}").st_mode) == 0o600, name


def test_nothing_between_the_processes_is_pickled() -> None:
    banned = {"pickle", "marshal", "shelve", "multiprocessing", "dill", "cloudpickle"}
    files = [path for folder in ("wsgi_ts", "batcher", "gpu") for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 150
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & banned, path


# Answers


def test_raw_replies_carry_no_server_header(server: ServerProcess) -> None:
    reply = http.request(server.ports["inference"], "GET", "/ping")
    assert not {"server", "date", "x-powered-by"} & set(reply.headers)
