"""The Falcon apps behind the listeners: which routes a connector has, and the rules all of them share.

A path is split after percent-decoding, and empty segments at its end do not count (`/models/` is `/models`).
A resource with `on_request` takes every method; otherwise a method without its own `on_...` is a 405.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

import falcon

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.rest import console, management, openapi, repository, tokens, traces, workflows
from wsgi_ts.rest.responses import RequestIdHeader, install_error_handlers, response_type, write_json
from wsgi_ts.rest.router import Router
from wsgi_ts.security.cross_site import is_preflight
from wsgi_ts.settings.config import Config

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance
    from wsgi_ts.rest.responses import Response

#: The interfaces an app can carry. One app carries several when their addresses are equal.
KINDS = ("inference", "management", "metrics")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ApiDescription:
    """The connector's OpenAPI document: `OPTIONS /`, and `/api-description` with any method."""

    def __init__(self, kinds: Collection[str], config: Config) -> None:
        self._kinds = kinds
        self._config = config

    @cached_property
    def _document(self) -> dict[str, Any]:
        """The document: made when it is asked for, which it never is on most servers."""
        return openapi.document(self._kinds, self._config)

    def on_options_root(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers `OPTIONS /`; every other method on `/` is a 405."""
        write_json(resp, 200, self._document)

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers `/api-description`."""
        write_json(resp, 200, self._document)


class Metrics:
    """`/metrics`, with any method, in Prometheus' text format; in `metrics_mode` log they are in the log files.

    The supervisor has the numbers and writes the text (`wsgi_ts.supervisor.metrics.collector`).
    """

    def __init__(self, mode: str, control: ControlPlane) -> None:
        self._in_logs = mode == "log"
        self._control = control

    def on_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers with all metrics, or those named by `name[]`."""
        resp.set_header("content-type", _METRICS_TYPE)
        text = "" if self._in_logs else self._control.call("metrics", names=req.get_param_as_list("name[]") or None)
        resp.data = text.encode()


def build_app(
    kinds: Collection[str], instance: Instance, control: ControlPlane | None = None
) -> falcon.App[falcon.Request, Response]:
    """The WSGI app of one listener.

    A listener serves several of `KINDS` when they share an address. `control` is closed by the caller; by default the
    app has its own for life.

    Raises:
        ValueError: a kind is unknown, or there is none.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"an app needs one or more of {', '.join(KINDS)}; got {sorted(kinds)}")
    if "inference" in kinds and "management" in kinds and instance.config.enable_metrics_api:
        # One address for both answers /metrics too, besides the metrics API's own listener.
        kinds = {*kinds, "metrics"}
    middleware: list[Any] = [RequestIdHeader(), *([Preflights()] if instance.config.cors_allowed_origin else [])]
    if instance.config.token_authorization and {"inference", "management"} & set(kinds):
        middleware.append(tokens.TokenCheck(kinds, instance))
    app = falcon.App(response_type=response_type(cors_headers(instance.config)), middleware=middleware, router=Router())
    # A prediction has no content type unless its handler sets one.
    app.resp_options.default_media_type = None  # type: ignore[assignment]
    install_error_handlers(app)
    description = ApiDescription(kinds, instance.config)
    app.add_route("/", description, suffix="root")
    app.add_route("/api-description", description)
    if instance.config.console and {"inference", "management"} & set(kinds):
        app.add_route("/docs", console.PageResource("docs"))
    if "inference" in kinds:
        # Brings the data plane with it, which only a process that serves predictions loads.
        from wsgi_ts.rest import inference, kserve

        predictions = inference.add_routes(app, instance)
        if instance.config.ts_open_inference_protocol:
            kserve.add_routes(app, predictions)
        if instance.config.serves_kserve and "management" not in kinds:
            # The management API has it in any case, as TorchServe does.
            kserve.add_v1_route(app, predictions)
    if "management" in kinds:
        control = control or ControlPlane(instance.run_dir)
        management.add_routes(app, instance, control)
        traces.add_routes(app, control)
        if instance.config.ts_open_inference_protocol:
            repository.add_routes(app, instance.config, control)
        workflows.add_routes(app, control)
        if instance.config.console:
            console.add_routes(app, instance, control)
        if instance.config.token_authorization:
            app.add_route("/token", tokens.Tokens(control))
    if "metrics" in kinds:
        control = control or ControlPlane(instance.run_dir)
        app.add_route("/metrics", Metrics(instance.config.metrics_mode, control))
    return app


class Preflights:
    """Falcon middleware: browsers hear from the headers of an empty answer what a page may send, on every path."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answers a preflight."""
        if is_preflight(req.env):
            resp.complete = True


def cors_headers(config: Config) -> dict[str, str]:
    """The Access-Control headers that the configuration asks for, on every answer."""
    wanted = {
        "access-control-allow-origin": config.cors_allowed_origin,
        "access-control-allow-methods": config.cors_allowed_methods,
        "access-control-allow-headers": config.cors_allowed_headers,
    }
    return {name: value for name, value in wanted.items() if value}
