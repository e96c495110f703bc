"""Mutual TLS: who may connect at all, and what plugins make of who has shown which certificate."""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.archives import archive
from support.authority import Authority
from support.eventually import eventually
from support.grpc_client import GrpcClient
from support.http import request
from support.server import REPOSITORY, ServerProcess

APIS = ("inference", "management", "metrics")
EXAMPLES = REPOSITORY / "examples" / "plugins"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom the server does not know."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    archive(path, "echo")
    return path


@pytest.fixture(scope="module")
def required(store: Path, authority: Authority) -> Iterator[ServerProcess]:
    config = {**authority.pem(), "client_ca_file": str(authority.folder / "ca.pem"), "enable_grpc_ssl": "true"}
    tls = dict.fromkeys(APIS, authority.client(authority.pem("team-a")))
    with ServerProcess(store=store, config=config, tls=tls) as server:
        assert server.register("echo.mar").status == 200
        yield server


def test_who_shows_a_certificate_is_served(required: ServerProcess) -> None:
    assert required.predict("echo", b"x").body == b"x"
    assert required.request("metrics", "GET", "/metrics").status == 200


@pytest.mark.parametrize("api", APIS)
def test_others_get_no_answer(required: ServerProcess, authority: Authority, stranger: Authority, api: str) -> None:
    forged = authority.client(stranger.pem("team-a"))
    for client in (authority.client(), forged):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            request(required.ports[api], "GET", "/ping", tls=client)
    assert required.request(api, "GET", "/api-description" if api != "metrics" else "/metrics").status == 200


def test_over_grpc(required: ServerProcess, authority: Authority, stranger: Authority) -> None:
    roots = (authority.folder / "ca.pem").read_bytes()
    with GrpcClient(required, roots, shown=pair(authority.pem("team-a"))) as client:
        assert client.predict("echo", input={"body": b"x"}) == b"x"
    for shown in ((None, None), pair(stranger.pem("team-a"))):
        with GrpcClient(required, roots, shown=shown) as client, pytest.raises(grpc.RpcError) as failed:
            client.ping()
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


def plugins(folder: Path, example: str) -> Path:
    """A folder with one of the examples."""
    made = folder / "plugins"
    made.mkdir()
    shutil.copy(EXAMPLES / example, made)
    return made


def pair(files: dict[str, str]) -> tuple[bytes, bytes]:
    return Path(files["private_key_file"]).read_bytes(), Path(files["certificate_file"]).read_bytes()


def test_the_example_goes_by_the_name_in_the_certificate(store: Path, authority: Authority, tmp_path: Path) -> None:
    clients = tmp_path / "clients.json"
    clients.write_text(json.dumps({"team-a": {"models": ["echo"], "actions": ["predict"]}}))
    config = {
        **authority.pem(),
        "client_ca_file": str(authority.folder / "ca.pem"),
        "client_certificate": "optional",
        "plugins_path": str(plugins(tmp_path, "client_certificates.py")),
        "enable_grpc_ssl": "true",
        "load_models": "echo.mar",
    }
    tls = dict.fromkeys(APIS, authority.client())
    with ServerProcess(store=store, config=config, tls=tls, environment={"CLIENTS_FILE": str(clients)}) as server:
        known, other = (authority.client(authority.pem(name)) for name in ("team-a", "team-b"))
        port = server.ports["inference"]

        def ask(client: ssl.SSLContext, port: int = port, path: str = "/predictions/echo") -> int:
            return request(port, "POST", path, body=b"x", tls=client).status

        eventually(lambda: ask(known) == 200, within=60, what="the model")
        assert ask(authority.client()) == 401
        assert ask(other) == 403
        # What it may do is its own, however many others have asked from this address.
        assert ask(known) == 200
        assert ask(known, server.ports["management"], "/models?url=echo.mar") == 403
        assert server.request("inference", "GET", "/ping").status == 200
        roots = (authority.folder / "ca.pem").read_bytes()
        with GrpcClient(server, roots, shown=pair(authority.pem("team-a"))) as client:
            assert client.predict("echo", input={"body": b"x"}) == b"x"
        with GrpcClient(server, roots) as client, pytest.raises(grpc.RpcError) as failed:
            client.predict("echo", input={"body": b"x"})
        assert failed.value.code() == grpc.StatusCode.UNAUTHENTICATED
        clients.write_text(json.dumps({"team-b": {"models": ["*"], "actions": ["*"]}}))
        eventually(lambda: (ask(known), ask(other)) == (403, 200), within=10, what="the new clients")


def test_the_example_with_keys(store: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    entry = {"name": "team-a", "models": ["echo"], "actions": ["predict"]}
    keys.write_text(json.dumps({hashlib.sha256(b"s3cret").hexdigest(): entry}))
    config = {"plugins_path": str(plugins(tmp_path, "api_keys.py")), "load_models": "echo.mar"}
    with ServerProcess(store=store, config=config, environment={"API_KEYS_FILE": str(keys)}) as server:
        eventually(lambda: server.predict("echo", b"x", x_api_key="s3cret").status == 200, within=60, what="the model")
        assert server.predict("echo", b"x").status == 401
        assert server.predict("echo", b"x", x_api_key="guessed").status == 401
        assert server.predict("other", b"x", x_api_key="s3cret").status == 403
        listed = server.request("management", "GET", "/models", headers={"x-api-key": "s3cret"})
        assert (listed.status, listed.json()["message"]) == (403, "team-a is not allowed to ask for this: describe")
        assert server.request("inference", "GET", "/ping").status == 200


def test_certificates_that_nobody_asks_for_stop_the_start(store: Path, authority: Authority) -> None:
    config = {"client_ca_file": str(authority.folder / "ca.pem")}
    with (
        pytest.raises(Exception, match="client_ca_file is set, and no address is https"),
        ServerProcess(store=store, config=config),
    ):
        pass
