"""Names of routes: bounded, and those of the API description."""

from __future__ import annotations

import re

import pytest

from wsgi_ts.http.route_names import METHODS, ROUTES, route_of, series_key, series_labels
from wsgi_ts.rest.apps import KINDS
from wsgi_ts.rest.openapi import document
from wsgi_ts.settings.config import Config


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/predictions/m", "/predictions/{model_name}"),
        ("/predictions/m/", "/predictions/{model_name}"),
        ("/predictions/m/1.0/generate/more", "/predictions/{model_name}/{model_version}"),
        ("/v1/models/a:b:predict", "/v1/models/{model_name}:predict"),
        ("/v1/models/a", "/v1/models/{model_name}"),
        ("/models/m/invoke", "/models/{model_name}/invoke"),
        ("/models/m/1.0", "/models/{model_name}/{model_version}"),
        ("/m/predict", "/{model_name}/predict"),
        ("/WFpredict/w/whatever/follows", "/wfpredict/{workflow_name}"),
        ("/", "/"),
        ("//", "/"),
        ("/console/inference/predictions/m", "/console/inference"),
        ("/debug/traces/0a1b", "/debug/traces/{request_id}"),
        ("/predictions", "_OTHER"),
        ("/a/b/c/d", "_OTHER"),
        ("", "/"),
    ],
)
def test_a_path_has_the_name_of_its_route(path: str, route: str) -> None:
    assert ROUTES[route_of(path)] == route


def test_every_route_of_the_description_has_a_name() -> None:
    config = Config(ts_open_inference_protocol=True, enable_model_api=True)
    for path in document(KINDS, config)["paths"]:
        asked = re.sub(r"\{\w+\}", "x", path)
        assert ROUTES[route_of(asked)] != "_OTHER", path


def test_a_key_says_what_it_was_made_of() -> None:
    for method, route, status in ((0, 0, 0), (1, len(ROUTES) - 1, 599), (len(METHODS) - 1, 3, 200)):
        key = series_key(method, route, status)
        assert 0 < key < 2**64
        assert series_labels(key) == (METHODS[method], ROUTES[route], str(status) if status else "_OTHER")
