"""The OpenAPI documents are valid, and true: schemathesis asks the running server what they say, and judges it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from openapi_spec_validator import OpenAPIV30SpecValidator
from support.archives import archive
from support.server import ServerProcess

from wsgi_ts.errors import BadRequest
from wsgi_ts.messages import WorkerReport
from wsgi_ts.models.arguments import MAX_BATCH_SIZE, MAX_WORKERS, RegisterArguments
from wsgi_ts.models.queries import describe_worker
from wsgi_ts.models.version import WorkerRecord
from wsgi_ts.rest import openapi, schemas
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.model_entries import RUNTIMES
from wsgi_ts.settings.table import settings_of

APIS = ("inference", "management", "metrics")
#: How long a call may take on a busy machine, in seconds.
LIMIT_S = 120.0
#: TorchServe's paths and the names of their operations.
TORCHSERVE = {
    "inference": {
        "/": {"options": "apiDescription"},
        "/ping": {"get": "ping"},
        "/v1/models/{model_name}:predict": {"post": "predictionsV1"},
        "/v2/models/{model_name}/infer": {"post": "predictionsV2"},
        "/predictions/{model_name}": {"post": "predictions"},
        "/predictions/{model_name}/{model_version}": {"post": "version_predictions"},
        "/api-description": {"get": "api-description"},
        "/metrics": {"get": "metrics"},
    },
    "management": {
        "/": {"options": "apiDescription"},
        "/models": {"get": "listModels", "post": "registerModel"},
        "/models/{model_name}": {"get": "describeModel", "put": "setAutoScale", "delete": "unregisterModel"},
        "/models/{model_name}/{model_version}": {
            "get": "version_describeModel",
            "put": "version_setAutoScale",
            "delete": "version_unregisterModel",
        },
        "/models/{model_name}/{model_version}/set-default": {"put": "setDefault"},
        "/api-description": {"get": "api-description"},
        "/metrics": {"get": "metrics"},
    },
    "metrics": {"/metrics": {"get": "metrics"}},
}
EXAMPLES = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    config = {"metrics_mode": "prometheus", "ts_open_inference_protocol": "true"}
    with ServerProcess(store=store, config=config) as running:
        reply = running.register("echo.mar")
        assert reply.status == 200, reply.text
        yield running


@pytest.fixture(scope="module")
def described(server: ServerProcess) -> dict[str, schemathesis.BaseSchema]:
    """What schemathesis makes of each API's document, read once: that takes a second each."""
    return {api: schemathesis.openapi.from_dict(fetch(server, api)) for api in APIS}


def fetch(server: ServerProcess, api: str) -> dict[str, Any]:
    reply = server.request(api, "OPTIONS", "/")
    assert reply.status == 200
    document: dict[str, Any] = reply.json()
    return document


@pytest.mark.parametrize("api", APIS)
def test_valid_and_with_torchserves_names(server: ServerProcess, api: str) -> None:
    document = fetch(server, api)
    OpenAPIV30SpecValidator(document).validate()
    assert document["info"]["title"] == "TorchServe APIs"
    assert document["info"]["version"] == "0.12.0"
    for path, operations in TORCHSERVE[api].items():
        for method, name in operations.items():
            assert document["paths"][path][method]["operationId"] == name
    assert server.request(api, "GET", "/api-description").json() == document


@pytest.mark.parametrize("path", ["/predictions/echo", "/predictions/echo/1.0"])
def test_document_of_a_model(server: ServerProcess, path: str) -> None:
    document = server.request("inference", "OPTIONS", path).json()
    OpenAPIV30SpecValidator(document).validate()
    assert document["info"] == {"title": "RESTful API for: echo", "version": "1.0.0"}
    assert path in document["paths"]
    for described in document["paths"]:
        assert server.request("inference", "POST", described, body=b"x").body == b"x"


@pytest.mark.parametrize("path", ["/models/echo", "/models/echo/1.0"])
def test_document_of_managing_a_model(server: ServerProcess, path: str) -> None:
    document = server.request("management", "OPTIONS", path).json()
    OpenAPIV30SpecValidator(document).validate()
    assert document["info"]["title"] == "RESTful Management API for: echo"
    one = "/models/{model_name}"
    assert {(described, method) for described in document["paths"] for method in document["paths"][described]} == {
        *((f"{one}{version}", method) for version in ("", "/{model_version}") for method in ("get", "put", "delete")),
        *((f"{one}{version}", "options") for version in ("", "/{model_version}")),
        (f"{one}/{{model_version}}/set-default", "put"),
    }


@pytest.mark.parametrize("tokens", [False, True])
def test_what_depends_on_settings(tokens: bool) -> None:
    config = Config(disable_token_authorization=not tokens)
    document = openapi.document(APIS, config)
    OpenAPIV30SpecValidator(document).validate()
    assert ("/token" in document["paths"]) is tokens
    assert document["paths"]["/predictions/{model_name}"]["post"].get("security") == (
        [{"inference": []}] if tokens else None
    )
    assert "security" not in document["paths"]["/api-description"]["get"]
    assert "/v2/health/live" not in document["paths"]
    assert "405" in document["paths"]["/models"]["post"]["responses"]


def operations(api: str) -> list[tuple[str, str]]:
    """The operations that a connector answers itself; /metrics has a connector of its own."""
    document = openapi.document(
        (api,), Config(enable_model_api=True, disable_token_authorization=True, ts_open_inference_protocol=True)
    )
    return [
        (path, method)
        for path, row in document["paths"].items()
        for method in row
        if method != "servers" and (path != "/metrics" or api == "metrics")
    ]


CASES = [(api, path, method) for api in APIS for path, method in operations(api)]


@pytest.mark.slow
@pytest.mark.parametrize(("api", "path", "method"), CASES)
def test_the_server_does_what_the_document_says(
    server: ServerProcess, described: dict[str, schemathesis.BaseSchema], api: str, path: str, method: str
) -> None:
    operation = described[api][path][method.upper()]
    strategy = operation.as_strategy()
    url = f"http://127.0.0.1:{server.ports[api]}"

    @EXAMPLES
    @given(strategy)
    def check(case: schemathesis.Case) -> None:
        counts = case.query or {}
        least = _number(counts.get("min_worker", 1), 1)
        assume(least <= _number(counts.get("max_worker", least), least))  # OpenAPI cannot say this
        case.call_and_validate(base_url=url, timeout=LIMIT_S)
        if "model_name" in (case.path_parameters or {}) and (api == "inference" or method == "get"):
            case.path_parameters["model_name"] = "echo"
            case.call_and_validate(base_url=url, timeout=LIMIT_S)

    check()


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def test_the_limits_are_the_servers() -> None:
    """What the document allows at most passes, and one more does not."""
    post = openapi.document(["management"], Config())["paths"]["/models"]["post"]
    described = {row["name"]: row["schema"] for row in post["parameters"]}
    for name, most in (("batch_size", MAX_BATCH_SIZE), ("initial_workers", MAX_WORKERS)):
        assert described[name]["anyOf"][0]["maximum"] == most
        RegisterArguments.checked({"url": "a.mar", name: most})
        with pytest.raises(BadRequest, match=f"{name} must not be larger than {most}"):
            RegisterArguments.checked({"url": "a.mar", name: most + 1})
    for runtime in described["runtime"]["enum"]:
        RegisterArguments.checked({"url": "a.mar", "runtime": runtime})
    assert set(described["runtime"]["enum"]) == set(RUNTIMES)
    with pytest.raises(BadRequest, match=r"Wrong arguments: .*'workers'"):
        RegisterArguments.checked({"url": "a.mar", "workers": 1})
    with pytest.raises(BadRequest, match="Parameter url is required"):
        RegisterArguments.checked({})
    with pytest.raises(BadRequest, match="Invalid RuntimeType value: ruby"):
        RegisterArguments.checked({"url": "a.mar", "runtime": "ruby"})


def test_every_argument_and_every_field_of_a_worker_is_there() -> None:
    post = openapi.document(["management"], Config())["paths"]["/models"]["post"]
    assert {row["name"] for row in post["parameters"]} == set(settings_of(RegisterArguments))
    report = WorkerReport(9000, 0, "backoff", exit_reason="signal 9", last_lines=["x"], progress="rank 1 loads")
    worker = WorkerRecord(9000, 1, 0, 0, devices=(0, 1), report=report)
    described = schemas.COMPONENTS["Worker"]
    shown = describe_worker(worker)
    assert {"gpuIds", "progress", "lastExit", "lastLines"} < shown.keys()
    jsonschema.validate(shown, described)
    assert shown.keys() == described["properties"].keys()
