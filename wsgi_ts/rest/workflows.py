"""The part of the management API that is about workflows: arguments and methods; the supervisor does the rest."""

from __future__ import annotations

from typing import Any

import falcon

from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import BadRequest
from wsgi_ts.models.arguments import page_arguments
from wsgi_ts.rest.management import (
    argument,
    integer_argument,
    is_json,
    parse_body,
    read_body,
    to_integer,
    warn_of_unknown,
    write_answer,
)
from wsgi_ts.settings.table import settings_of
from wsgi_ts.workflows.arguments import WorkflowArguments


class Workflows:
    """`/workflows`: list and register; `/workflows/{workflow_name}`: describe and unregister."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lists the workflows by name, `limit` of them from number `next_page_token` on."""
        page = page_arguments(integer_argument(req, "limit"), integer_argument(req, "next_page_token"))
        write_answer(resp, self._control.call("list_workflows", timeout_s=QUICK_CALL_S, **page))

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Registers a workflow, by query string or by JSON body; a number that is none counts as not given."""
        fields = parse_body(read_body(req)) if is_json(req) else None
        given: dict[str, Any] = {}
        known = settings_of(WorkflowArguments)
        warn_of_unknown(req, req.params if fields is None else fields, known)
        for name, row in known.items():
            value = argument(req, name) if fields is None else fields.get(name)
            if row.kind.json_type == "integer":
                number = _number(value)
                given[name] = row.default if number is None else number
            elif row.kind.json_type == "boolean":
                given[name] = str(value).lower() == "true"
            else:
                given[name] = None if value is None else str(value)
        if given["url"] is None:
            raise BadRequest("Parameter url is required.")
        write_answer(resp, self._control.call("register_workflow", **given))

    def on_get_one(self, req: falcon.Request, resp: falcon.Response, workflow_name: str, rest: str = "") -> None:
        """Describes a workflow."""
        answer = self._control.call("describe_workflow", timeout_s=QUICK_CALL_S, workflow_name=workflow_name)
        write_answer(resp, answer)

    def on_delete_one(self, req: falcon.Request, resp: falcon.Response, workflow_name: str, rest: str = "") -> None:
        """Unregisters a workflow with all its nodes."""
        write_answer(resp, self._control.call("unregister_workflow", workflow_name=workflow_name))


def add_routes(app: falcon.App[Any, Any], control: ControlPlane) -> None:
    """Gives `app` the routes of workflows."""
    workflows = Workflows(control)
    app.add_route("/workflows", workflows)
    app.add_route("/workflows/{workflow_name}", workflows, suffix="one")
    app.add_route("/workflows/{workflow_name}/{rest}", workflows, suffix="one")


def _number(value: Any) -> int | None:
    """A number of a query string or a JSON body, None where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else to_integer(str(value))
