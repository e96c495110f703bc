"""Ways around tokens: other spellings of a path, other headers, other methods, the token of another API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from support.archives import archive
from support.grpc_client import (
    inference_pb2_grpc,
    management_pb2,
    management_pb2_grpc,
    request,
)
from support.server import ServerProcess

ON = {"disable_token_authorization": "false", "enable_model_api": "true"}

#: Spellings of `/models`, and of what might pass for something else on the way to it.
TARGETS = (
    *("/models", "/models/", "//models", "/./models", "/models//", "/models/.", "/models/echo/..", "/models?x=/ping"),
    *("/predictions/../models", "/predictions/%2e%2e/models", "/predictions/..%2fmodels", "/ping/../models"),
    *("/ping%2f..%2fmodels", "/ping/..;/models", "/ping;/models", "/%6dodels", "/%6D%6F%64%65%6C%73", "/models%2F"),
    *("/models%00", "/models%20", "/models%23", "/models#/ping", "/Models", "/MODELS", "/models;token", "\\models"),
    *("http://localhost/models", "http://localhost/ping/../models", "HTTP://x:1/models", "http://localhost//models"),
    *(
        "/models/echo",
        "/models/echo/1.0",
        "//models/echo",
        "/models/%65cho",
        "/models/echo%2f1.0",
        "/api-description/../models",
    ),
    *(
        "/api-description%2f..%2fmodels",
        "/livez/../models",
        "/livez%2f%2e%2e%2fmodels",
        "/token",
        "/token?type=management",
    ),
    *(
        "/%74oken?type=management",
        "//token?type=management",
        "/ping/../token?type=management",
        "/workflows",
        "/v2/repository/index",
    ),
)
#: What proxies and frameworks take for another path, method or identity.
HEADERS = (
    *("X-HTTP-Method-Override: DELETE", "X-HTTP-Method: DELETE", "X-Method-Override: DELETE", "X-Original-URL: /ping"),
    *("X-Rewrite-URL: /ping", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: localhost", "X-Real-IP: 127.0.0.1"),
    *("Forwarded: for=127.0.0.1", "X-Forwarded-Prefix: /ping", "X-Forwarded-User: admin", "Remote-User: admin"),
    *(
        "Authorization;: Bearer {key}",
        "Proxy-Authorization: Bearer {key}",
        "X-Authorization: Bearer {key}",
        "Cookie: token={key}",
    ),
    *(
        "Authorization_: Bearer {key}",
        "HTTP_AUTHORIZATION: Bearer {key}",
        "Authorization : Bearer {key}",
        "Authentication: Bearer {key}",
    ),
    *(
        "Authorization: Bearer {key}, Bearer {key}",
        "Authorization: Bearer ",
        "Authorization: Bearer null",
        "Authorization: {key}",
    ),
    *(
        "Authorization: Bearer {key}\r\nAuthorization: Bearer {key}",
        "Authorization: Bearer x\r\nAuthorization: Bearer {key}",
    ),
    *(
        "Authorization:\r\n Bearer {key}",
        "Authorization: Bearer\x0b{key}",
        "Authorization: BeArEr {key}",
        "Authorization: Bearer {half}",
    ),
)
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "QUERY", "get", "CONNECT", "PROPFIND")


@pytest.fixture(scope="module", params=["apart", "shared"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """With an address for each API, and with one for both."""
    with ServerProcess(config=ON, combined=request.param == "shared") as server:
        archive(server.store, "echo")
        assert _register(server) == 200
        yield server


def _register(server: ServerProcess) -> int:
    headers = {"Authorization": f"Bearer {key(server, 'management')}"}
    return server.request(
        "management", "POST", "/models?url=echo.mar&initial_workers=1&synchronous=true", headers=headers
    ).status


def key(server: ServerProcess, scope: str) -> str:
    text: str = json.loads((server.home / "key_file.json").read_text())[scope]["key"]
    return text


def send(server: ServerProcess, method: str, target: str, *lines: str) -> tuple[int, bytes]:
    """Sends a request to the management API's address; returns status and body, 0 where there is no answer."""
    head = "".join(
        f"{line}\r\n" for line in (f"{method} {target} HTTP/1.1", "Host: localhost", "Content-Length: 0", *lines)
    )
    with server.raw("management") as raw:
        raw.send(head.encode("latin-1") + b"\r\n")
        try:
            line, _, body = raw.read_answer()
        except (AssertionError, ConnectionError, EOFError, ValueError, IndexError):
            return 0, b""
        return int(line.split()[1]), body


def check_refused(server: ServerProcess, answer: tuple[int, bytes], what: str) -> None:
    status, body = answer
    assert status == 0 or 400 <= status < 500 or status == 501, (what, status, body[:200])
    assert b"modelName" not in body and b"workers" not in body, (what, body[:200])


@pytest.mark.parametrize("scope", ["", "inference"])
def test_no_spelling_of_a_path_needs_less_than_its_token(server: ServerProcess, scope: str) -> None:
    lines = [f"Authorization: Bearer {key(server, scope)}"] if scope else []
    for target in TARGETS:
        for method in ("GET", "DELETE", "PUT", "POST"):
            check_refused(server, send(server, method, target, *lines), f"{method} {target}")
    unharmed(server)


def test_no_header_stands_in_for_the_token(server: ServerProcess) -> None:
    right = key(server, "management")
    for header in HEADERS:
        line = header.format(key=right, half=right[:20])
        check_refused(server, send(server, "GET", "/models", line), header)
    for header in HEADERS[:12]:
        status, body = send(server, "GET", "/models/echo", header, f"Authorization: Bearer {right}")
        assert status == 200 and b"modelName" in body, header
    unharmed(server)


def test_no_method_needs_less_than_the_token(server: ServerProcess) -> None:
    for method in METHODS:
        for target in ("/models", "/models/echo", "/token?type=management"):
            check_refused(server, send(server, method, target), f"{method} {target}")
    unharmed(server)


def unharmed(server: ServerProcess) -> None:
    """The model is there, and the keys are the ones that there were."""
    line = f"Authorization: Bearer {key(server, 'management')}"
    status, body = send(server, "GET", "/models/echo", line)
    assert status == 200 and json.loads(body)[0]["workers"]


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer "),),
        (("authorization", "{other}"),),
        (("authorization", "Bearer {other}"),),
        (("authorization", "bearer {key}"),),
        (("authorization", "{key}"),),
        (("authorization", "Bearer {key},Bearer {key}"),),
        (("authorization", "Bearer x"), ("authorization", "Bearer {key}")),
        (("authorization-bin", "Bearer {key}"),),
        (("x-authorization", "Bearer {key}"),),
        (("protocol", "REST"), ("token", "{key}")),
        (("grpcgateway-authorization", "Bearer {key}"),),
    ],
)
def test_grpc_takes_the_token_of_its_api_only(server: ServerProcess, metadata: tuple[tuple[str, str], ...]) -> None:
    for scope, other in (("inference", "management"), ("management", "inference")):
        texts = {"key": key(server, scope), "other": key(server, other)}
        sent: list[tuple[str, Any]] = []
        for name, value in metadata:
            text = value.format(**texts)
            sent.append((name, text.encode() if name.endswith("-bin") else text))
        where = f"127.0.0.1:{server.ports[f'grpc_{scope}']}"
        with grpc.insecure_channel(where) as channel, pytest.raises(grpc.RpcError) as caught:
            if scope == "inference":
                asked = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
                asked.Predictions(request("echo", b"x"), metadata=sent, timeout=90)
            else:
                managed = management_pb2_grpc.ManagementAPIsServiceStub(channel)
                managed.ListModels(management_pb2.ListModelsRequest(), metadata=sent, timeout=90)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
