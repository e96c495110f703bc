"""Token authorization against a running server, and model control beside it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess, free_ports

REFUSED = {
    "code": 400,
    "type": "InvalidKeyException",
    "message": "Token Authorization failed. Token either incorrect, expired, or not provided correctly",
}
REFUSED_RENEWAL = {
    **REFUSED,
    "message": "Token Authentication failed. Token either incorrect, expired, or not provided correctly",
}
#: Answers with the headers it was given, and what of this process could carry a token.
HEADERS = """
import json, os

def handle(data, context):
    if data is None:
        return None
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink("/proc/self/fd/" + fd))
        except OSError:
            continue
    headers = {key: str(context.get_request_header(0, key)) for key in ("Authorization", "authorization", "X-Mine")}
    return [json.dumps({"headers": headers, "environ": dict(os.environ), "links": links})] * len(data)
"""

#: The inference app under another WSGI server: here a call of the app itself, as gunicorn's gthread makes it.
OTHER_SERVER = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from falcon import testing
from wsgi_ts.settings.config import Config
from wsgi_ts.rest.apps import build_app

run_dir, prefix, key, other = sys.argv[1:]
config = Config.from_json((Path(run_dir) / "config.json").read_text())
settings = SimpleNamespace(config=config, run_dir=Path(run_dir), prefix=prefix)
app = build_app(["inference"], settings)

def ask(method, path, token=""):
    headers = {"Authorization": "Bearer " + token} if token else {}
    seen = testing.StartResponseMock()
    parts = app(testing.create_environ(path, method=method, body="x", headers=headers), seen)
    return [int(seen.status.split()[0]), b"".join(parts).decode(), "x-request-id" in seen.headers_dict]

answers = [ask("POST", "/predictions/headers", token) for token in ("", key, other)]
answers.append(ask("GET", "/api-description"))
print(json.dumps(answers))
sys.stdout.flush()
os._exit(0)  # a thread waits on the doorbell
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Tokens on although all is on loopback, the model API off, two models loaded at startup."""
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "headers", HEADERS)
    config = {
        "disable_token_authorization": "false",
        "enable_model_api": "false",
        "load_models": "all",
        "default_workers_per_model": "1",
        "cors_allowed_origin": "https://example.org",
    }
    with ServerProcess(store=store, config=config, web_workers=2) as running:
        eventually(lambda: all_ready(running), within=60, what="workers of both models")
        yield running


def all_ready(server: ServerProcess) -> bool:
    return server.request("inference", "GET", "/ping", headers=bearer(server, "inference")).status == 200 and all(
        server.request("management", "GET", f"/models/{model}", headers=bearer(server, "management")).json()[0][
            "workers"
        ][0]["status"]
        == "READY"
        for model in ("echo", "headers")
    )


def keys(server: ServerProcess) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((server.home / "key_file.json").read_text())
    return found


def bearer(server: ServerProcess, scope: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {keys(server)[scope]['key']}"}


def refused(reply: http.Reply, body: Mapping[str, Any] = REFUSED) -> None:
    assert (reply.status, reply.json()) == (400, body)
    assert reply.headers["connection"] == "close"
    assert reply.headers["content-type"] == "application/json"
    assert "x-request-id" in reply.headers


# The file


def test_the_key_file(server: ServerProcess) -> None:
    path = server.home / "key_file.json"
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
    found = keys(server)
    assert list(found) == ["management", "inference", "API"]
    assert path.read_text() == json.dumps(found, indent=2) + "\n"
    assert set(found["API"]) == {"key"}
    for scope in ("management", "inference"):
        assert set(found[scope]) == {"key", "expiration time"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", found[scope]["expiration time"])
    texts = [entry["key"] for entry in found.values()]
    assert len(set(texts)) == 3
    for text in texts:
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", text)  # 256 bits
    assert [entry.name for entry in server.home.glob(".key_file*")] == []


# Who passes


@pytest.mark.parametrize(
    ("api", "scope", "method", "path"),
    [
        ("inference", "inference", "POST", "/predictions/echo"),
        ("inference", "inference", "POST", "/v1/models/echo:predict"),
        ("inference", "inference", "POST", "/v2/models/echo/infer"),
        ("inference", "inference", "GET", "/ping"),
        ("management", "management", "GET", "/models"),
        ("management", "management", "GET", "/models/echo"),
        ("management", "management", "PUT", "/models/echo?min_worker=1"),
        ("management", "management", "GET", "/workflows"),
    ],
)
def test_each_scope_opens_its_own_api_only(server: ServerProcess, api: str, scope: str, method: str, path: str) -> None:
    for other in ("management", "inference", "API"):
        reply = server.request(api, method, path, headers=bearer(server, other), body=b"x")
        if other == scope:
            assert reply.status in (200, 202), reply.text
        else:
            refused(reply)
    refused(server.request(api, method, path, body=b"x"))


@pytest.mark.parametrize(
    ("api", "method", "path"),
    [
        ("inference", "OPTIONS", "/"),
        ("inference", "GET", "/api-description"),
        ("management", "OPTIONS", "/"),
        ("management", "POST", "/api-description/"),
        ("metrics", "GET", "/metrics"),
        ("metrics", "OPTIONS", "/"),
    ],
)
def test_descriptions_and_metrics_take_no_token(server: ServerProcess, api: str, method: str, path: str) -> None:
    assert server.request(api, method, path).status == 200


@pytest.mark.parametrize(
    "form",
    [
        "",
        "{key}",
        "bearer {key}",
        "BEARER {key}",
        "Basic {key}",
        "Bearer",
        "Bearer{key}",
        "Bearer {key} x",
        "Bearer {key},{key}",
        "Bearer {half}",
        "Bearer {key}x",
        "Bearer {upper}",
        "Token Bearer {key}",
        "Bearer \xff",
    ],
)
def test_other_forms_of_the_header_are_refused(server: ServerProcess, form: str) -> None:
    key = keys(server)["inference"]["key"]
    text = form.format(key=key, half=key[:20], upper=key.swapcase())
    with server.raw() as raw:
        raw.send(f"GET /ping HTTP/1.1\r\nHost: x\r\nAuthorization: {text}\r\n\r\n".encode("latin-1"))
        line, _, body = raw.read_answer()
        assert line.split()[1] == b"400" and json.loads(body) == REFUSED
        assert raw.at_end()


def test_blanks_between_scheme_and_token_do_not_matter(server: ServerProcess) -> None:
    key = keys(server)["inference"]["key"]
    assert server.request("inference", "GET", "/ping", headers={"Authorization": f"Bearer \t {key}"}).status == 200


def test_twice_in_the_query_too_large_and_with_nul(server: ServerProcess) -> None:
    key = keys(server)["inference"]["key"]
    line = f"Authorization: Bearer {key}\r\n"
    cases = [
        (f"GET /ping HTTP/1.1\r\nHost: x\r\n{line}{line}\r\n", b"400"),
        (f"GET /ping?token={key} HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (f"GET /ping HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {'x' * 1_000_000}\r\n\r\n", b"431"),
        (f"GET /ping HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\0\r\n\r\n", b"400"),
        (f"GET /ping HTTP/1.1\r\nHost: x\r\nAuthorization_: Bearer {key}\r\n\r\n", b"400"),
    ]
    for data, status in cases:
        with server.raw() as raw:
            raw.send(data.encode())
            line_, _, _ = raw.read_answer()
            assert line_.split()[1] == status, data[:80]


def test_heads_that_differ_in_the_token_only_do_not_share_an_admission(server: ServerProcess) -> None:
    good = bearer(server, "inference")
    bad = {"Authorization": good["Authorization"][:-1] + ("A" if good["Authorization"][-1] != "A" else "B")}
    for _ in range(20):
        assert server.predict("echo", b"x", **good).status == 200
        refused(server.predict("echo", b"x", **bad))


def test_the_body_of_a_refused_request_is_not_taken(server: ServerProcess) -> None:
    with server.raw() as raw:
        raw.send(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n")
        raw.send(b"Expect: 100-continue\r\n\r\n")
        line, headers, body = raw.read_answer()  # and no "100 Continue" before it
        assert line.split()[1] == b"400" and json.loads(body) == REFUSED
        assert headers["connection"] == "close"
        assert raw.at_end()


def test_a_refusal_does_not_say_what_exists(server: ServerProcess) -> None:
    for path in ("/predictions/unknown", "/nothing", "/models/echo/invoke"):
        refused(server.request("inference", "POST", path, body=b"x"))
    refused(server.request("management", "GET", "/models/unknown"))
    assert server.predict("unknown", b"x", **bearer(server, "inference")).status == 404


def test_cors_headers_are_on_refusals_and_a_preflight_needs_no_token(server: ServerProcess) -> None:
    headers = {"Origin": "https://example.org"}
    reply = server.request("inference", "OPTIONS", "/predictions/echo", headers=headers)
    refused(reply)
    headers["Access-Control-Request-Method"] = "POST"
    for api, path in (("inference", "/predictions/echo"), ("management", "/models"), ("inference", "/nothing")):
        preflight = server.request(api, "OPTIONS", path, headers=headers)
        assert (preflight.status, preflight.body) == (200, b"")
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"
    # One with a body is no browser's question.
    refused(server.request("inference", "OPTIONS", "/predictions/echo", headers=headers, body=b"x"))
    refused(server.request("inference", "POST", "/predictions/echo", headers=headers, body=b"x"))
    assert reply.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-credentials" not in reply.headers


# What others get to see


def test_handlers_get_no_token(server: ServerProcess) -> None:
    reply = server.predict("headers", b"x", X_Mine="1", **bearer(server, "inference"))
    assert reply.status == 200, reply.text
    seen = reply.json()
    assert seen["headers"] == {"Authorization": "None", "authorization": "None", "X-Mine": "1"}
    everything = json.dumps(seen)
    for entry in keys(server).values():
        assert entry["key"] not in everything
    assert not [link for link in seen["links"] if "key_file" in link or "memfd" in link or "tokens.json" in link]


def test_tokens_are_nowhere_but_in_the_key_file(server: ServerProcess) -> None:
    renew(server, "management")
    server.predict("echo", b"x", **bearer(server, "inference"))
    secrets = [entry["key"].encode() for entry in keys(server).values()]
    texts = [server.output().encode()]
    for folder in (server.home / "logs", server.run_dir):
        texts += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for process in server.processes():
        for name in ("cmdline", "environ"):
            texts.append(Path(f"/proc/{process.pid}/{name}").read_bytes())
    for text in texts:
        assert not any(secret in text for secret in secrets)


def test_the_app_asks_for_tokens_under_other_servers_too(server: ServerProcess) -> None:
    tokens = [keys(server)[scope]["key"] for scope in ("inference", "management")]
    run = subprocess.run(
        [sys.executable, "-c", OTHER_SERVER, str(server.run_dir), server.prefix, *tokens],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        check=True,
    )
    without, right, wrong, description = json.loads(run.stdout)
    assert (right[0], description[0]) == (200, 200)
    assert json.loads(right[1])["headers"]["Authorization"] == "None"
    for status, text, has_id in (without, wrong):
        assert (status, json.loads(text), has_id) == (400, REFUSED, True)


# Renewal


def renew(server: ServerProcess, scope: str, **headers: str) -> http.Reply:
    return server.request("management", "GET", f"/token?type={scope}", headers=headers or bearer(server, "API"))


@pytest.mark.parametrize("scope", ["management", "inference"])
def test_a_renewal_counts_everywhere_from_its_answer_on(server: ServerProcess, scope: str) -> None:
    path = {"management": "/models", "inference": "/ping"}[scope]
    for _ in range(10):
        before, old = keys(server), bearer(server, scope)
        for _ in range(4):  # so that both web workers have admitted the old head
            assert server.request(scope, "GET", path, headers=old).status == 200
        reply = renew(server, scope)
        assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b"\n", "application/json")
        after, new = keys(server), bearer(server, scope)
        for _ in range(4):
            refused(server.request(scope, "GET", path, headers=old))
            assert server.request(scope, "GET", path, headers=new).status == 200
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {scope}
    assert stat.S_IMODE((server.home / "key_file.json").stat().st_mode) == 0o600


def test_a_connection_that_was_admitted_is_checked_again_after_a_renewal(server: ServerProcess) -> None:
    old = bearer(server, "inference")["Authorization"]
    request = f"GET /ping HTTP/1.1\r\nHost: x\r\nAuthorization: {old}\r\n\r\n".encode()
    with server.raw() as raw:
        raw.send(request)
        assert raw.read_answer()[0].split()[1] == b"200"
        renew(server, "inference")
        raw.send(request)
        assert raw.read_answer()[0].split()[1] == b"400"


def test_renewals_that_are_refused(server: ServerProcess) -> None:
    before = keys(server)
    for scope in ("management", "inference"):
        refused(renew(server, "inference", **bearer(server, scope)), REFUSED_RENEWAL)
    refused(server.request("management", "GET", "/token?type=inference"), REFUSED_RENEWAL)
    for query in ("", "?type=", "?type=API", "?type=other", "?kind=inference", "?type=inference&type=management"):
        reply = server.request("management", "GET", f"/token{query}", headers=bearer(server, "API"))
        refused(reply, REFUSED_RENEWAL)
    # Only the route itself: the text "/token" elsewhere in a request changes nothing.
    refused(server.request("management", "GET", "/models?x=/token", headers=bearer(server, "API")))
    headers = {**bearer(server, "management"), "Referer": "http://x/token"}
    assert server.request("management", "GET", "/models", headers=headers).status == 200
    refused(server.request("inference", "GET", "/token?type=inference", headers=bearer(server, "API")))
    assert keys(server) == before


# Model control


def test_the_model_api_is_off_unless_switched_on(server: ServerProcess) -> None:
    token = bearer(server, "management")
    for method, path in (("POST", "/models?url=echo.mar"), ("DELETE", "/models/echo"), ("DELETE", "/models/echo/1.0")):
        reply = server.request("management", method, path, headers=token, body=b"")
        assert reply.status == 405
        assert reply.json()["type"] == "MethodNotAllowedException"
    for method, path in (("GET", "/models/echo"), ("PUT", "/models/echo?min_worker=1&synchronous=true")):
        assert server.request("management", method, path, headers=token).status == 200
    assert server.predict("echo", b"loaded at startup", **bearer(server, "inference")).status == 200


# Expiry, other addresses, the end


@pytest.mark.slow
def test_expiry_and_the_end_of_the_key_file() -> None:
    config = {"disable_token_authorization": "false", "token_expiration_min": "0.1"}
    with ServerProcess(config=config) as server:

        def passes() -> bool:
            return server.request("inference", "GET", "/ping", headers=bearer(server, "inference")).status == 200

        def is_renewed() -> bool:
            # A busy machine may take longer than a key lasts.
            return renew(server, "inference").status == 200 and passes()

        assert passes() or eventually(is_renewed, within=60)
        old = bearer(server, "inference")
        eventually(lambda: server.request("inference", "GET", "/ping", headers=old).status == 400, within=30)
        refused(server.request("inference", "GET", "/ping", headers=old))
        refused(server.request("management", "GET", "/models", headers=bearer(server, "management")))
        eventually(is_renewed, within=60)
        key_file = server.home / "key_file.json"
        assert server.stop() == []
        assert not key_file.exists()


def test_an_address_beyond_loopback_switches_tokens_on_and_a_link_is_replaced(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("not ours")
    server = ServerProcess(
        config={"disable_token_authorization": "", "inference_address": f"http://0.0.0.0:{port}"},
    )
    server.ports["inference"] = port
    (server.home / "key_file.json").symlink_to(elsewhere)
    with server:
        assert elsewhere.read_text() == "not ours"
        assert not os.path.islink(server.home / "key_file.json")
        refused(server.request("inference", "GET", "/ping"))
        refused(server.request("management", "GET", "/models"))
        assert server.request("inference", "GET", "/ping", headers=bearer(server, "inference")).status == 200
        assert "Token authorization is on" in server.log()


def test_a_shared_address_tells_inference_from_management(tmp_path: Path) -> None:
    archive(tmp_path, "echo")
    with ServerProcess(store=tmp_path, config={"disable_token_authorization": "false"}, combined=True) as server:
        inference, management = bearer(server, "inference"), bearer(server, "management")
        reply = server.request("inference", "POST", "/models?url=echo.mar&initial_workers=1", headers=management)
        assert reply.status == 200, reply.text
        for method, path in (
            ("POST", "/predictions/echo"),
            ("POST", "/models/echo/invoke"),
            ("POST", "/v1/models/echo:predict"),
            ("POST", "/echo/predict"),
            ("GET", "/ping"),
        ):
            assert server.request("inference", method, path, headers=inference, body=b"x").status == 200, path
            refused(server.request("inference", method, path, headers=management, body=b"x"))
        for method, path in (
            ("GET", "/models"),
            ("DELETE", "/models/predict"),
            ("DELETE", "/models/echo/predict"),
            ("DELETE", "//models/echo"),
            ("DELETE", "/models/echo"),
            ("GET", "/v1/models/echo"),
        ):
            refused(server.request("inference", method, path, headers=inference, body=b""))
        assert server.request("inference", "GET", "/models", headers=management).status == 200
        assert renew(server, "inference").status == 200
        refused(server.request("inference", "GET", "/ping", headers=inference))
