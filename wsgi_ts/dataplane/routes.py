"""What the path of a request means: which model version it asks for, and which batchers serve that.

`RoutingTable` is a process's copy of what the supervisor has published; `Target` is what a path means under it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.dataplane.graph import Graph
from wsgi_ts.errors import (
    BadRequest,
    InternalServerError,
    ModelNotFound,
    ModelVersionNotFound,
    ResourceNotFound,
    ServerError,
    ServiceUnavailable,
    WorkflowNotFound,
)
from wsgi_ts.http.form_field import form_field
from wsgi_ts.http.head import Head
from wsgi_ts.http.route_names import route_of
from wsgi_ts.run_files import RunFiles

log = logging.getLogger(__name__)

#: Paths and queries whose meaning is remembered.
_MOST_KNOWN: Final = 1024
#: How paths of KServe's protocols begin.
_KSERVE: Final = ("/v1/", "/v2/")
#: What stands for the version of a workflow, which has none.
DEFAULT_VERSION: Final = "1.0"
#: Of `/wfpredict/{workflow}`, split at its slashes.
_WORKFLOW_PARTS: Final = 3


@dataclass(frozen=True, slots=True)
class Target:
    """What the path of a prediction means: the model version, and what the handler is told of the path.

    Attributes:
        model_name, version: as the client has named them; no version is the default one.
        model: the index of the model version.
        batchers: those that have a worker of it.
        url_path: what stands behind the version in the path.
        flags: RequestFlag bits.
        client_timeout_ms: how long the client waits for its answer, 0 for as long as it takes.
        is_continuous: the answer is made in a continuous batch.
        error: set where the request is to be refused; of the other fields only `graph`, `flags` and those above
            `batchers` mean something.
        reads_form: the body, if it is a form, may name the model after all.
        graph: of a workflow, whose first node the other fields are about.
        is_special: it has a graph or sequences.
        route: the number of the path's template (see `http.route_names`); 0 where that is not known.
    """

    model_name: str
    version: str | None
    model: int = -1
    batchers: tuple[int, ...] = ()
    url_path: bytes = b""
    flags: int = 0
    client_timeout_ms: int = 0
    is_continuous: bool = False
    error: ServerError | None = None
    reads_form: bool = False
    graph: Graph | None = None
    is_special: bool = False
    route: int = 0


def prediction_parts(path: str, query: str) -> tuple[str, str | None, str, int] | None:
    """Reads a path as one of the prediction routes.

    Returns:
        Model name, version or None, the rest of the path, RequestFlag bits; None when it is no such route. A model
        name of "" means that the request should have named one, or has given an empty name (see `_gives_no_name`).

    Raises:
        ResourceNotFound: a prediction route without a model.
    """
    parts = path.split("/")[1:]
    while parts and not parts[-1]:
        parts.pop()
    if not parts:
        return None
    first = parts[0]
    if first in ("predictions", "explanations"):
        if len(parts) == 1:
            raise ResourceNotFound()
        flags = RequestFlag.URL_PATH | (RequestFlag.EXPLAIN if first == "explanations" else 0)
        return parts[1], parts[2] if len(parts) > 2 else None, "/".join(parts[3:]), flags
    if first == "invocations" and len(parts) == 1:
        names = parse_qs(query, encoding="latin-1").get("model_name", [""])
        return names[0], None, "", RequestFlag.QUERY_ROW
    if first == "models" and len(parts) == 3 and parts[2] == "invoke":
        return parts[1], None, "", RequestFlag.QUERY_ROW
    if first == "v1" and len(parts) == 3 and parts[1] == "models":
        name, _, verb = parts[2].rpartition(":")
        if verb in ("predict", "explain") and name:
            return name, None, "", RequestFlag.EXPLAIN if verb == "explain" else 0
    elif first == "v2" and len(parts) == 4 and parts[1] == "models" and parts[3] in ("infer", "explain"):
        return parts[2], None, "", RequestFlag.EXPLAIN if parts[3] == "explain" else 0
    elif parts[-1] == "predict" and len(parts) in (2, 3):
        return first, parts[1] if len(parts) == 3 else None, "", RequestFlag.QUERY_ROW
    return None


class RoutingTable:
    """What the supervisor has published, read again whenever the board's epoch moves.

    Args:
        workflow_names: whether a workflow answers over KServe and gRPC, where no model has its name.

    Attributes:
        healthy: every model has the workers it should have.
        started: the models of the start have been loaded.
        ready: requests are welcome.
        draining: the server stops, or will soon.
    """

    def __init__(self, run_dir: Path, board: Board, *, workflow_names: bool = True) -> None:
        self._workflow_names = workflow_names
        self._path = RunFiles(run_dir).routes
        self._board = board
        self._epoch = -1
        self._unread_epoch = -1
        self._models: dict[str, Any] = {}
        self._graphs: dict[str, Graph | None] = {}
        self._known: dict[tuple[str, str], Target | None] = {}
        #: Those that requests have gone to, by name, version and flags.
        self._targets: dict[tuple[str, str | None, int], Target] = {}
        self.healthy = True
        self.started = False
        self.ready = False
        self.draining = False
        #: First segments of paths that endpoints of plugins have taken over.
        self.taken: frozenset[str] = frozenset()

    def refresh(self) -> None:
        """Reads the published file again if there is a newer one (one load of a shared word if not)."""
        epoch = self._board.epoch
        if epoch == self._epoch:
            return
        try:
            table = json.loads(self._path.read_text(encoding="utf-8"))
        except OSError as error:
            # The routes that are known stay, and this is tried again; a process may be out of descriptors for a while.
            if not isinstance(error, FileNotFoundError) and self._unread_epoch != epoch:
                self._unread_epoch = epoch
                log.error("%s cannot be read: %s; requests go where they went before", self._path, error.strerror)
            return
        self._epoch = epoch
        self._models = table["models"]
        workflows = table["workflows"].items()
        self._graphs = {name: None if fields is None else Graph.from_json(name, fields) for name, fields in workflows}
        self._known.clear()
        self._targets.clear()
        self.healthy = bool(table["healthy"])
        self.started = bool(table["started"])
        self.ready = bool(table["ready"])
        self.draining = bool(table["draining"])

    def target_of(self, head: Head) -> Target | None:
        """Returns what a request asks for; None when it is not a prediction. Call `refresh` first.

        The answer is kept with the head, which the parser keeps for the next request that is worded alike, and for
        other heads that ask for the same.
        """
        if head.route_epoch != self._epoch:
            is_asked = head.method != "OPTIONS" or _workflow_in(head.path) is not None
            head.route = self._known_target(head.path, head.query) if is_asked else None
            head.route_epoch = self._epoch
        target: Target | None = head.route
        return target

    def _known_target(self, path: str, query: str) -> Target | None:
        asked = path, query
        if asked not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            is_taken = bool(self.taken) and path.split("/", 2)[1] in self.taken
            target = None if is_taken else self.target(path, query)
            self._known[asked] = target and replace(target, route=route_of(path))
        return self._known[asked]

    def target(self, path: str, query: str) -> Target | None:
        """Returns what a path means; None when it is not a prediction route. Call `refresh` first."""
        try:
            parts = prediction_parts(path, query)
        except ServerError as error:
            return Target("", None, error=error)
        if parts is None:
            workflow = _workflow_in(path)
            return None if workflow is None else self.workflow_target(_as_text(workflow))
        name, version, rest, flags = parts
        name = _as_text(name)
        if not name and flags & RequestFlag.QUERY_ROW:
            at_startup = [each for each, model in self._models.items() if model["startup"]]
            if len(at_startup) == 1:
                (name,) = at_startup
            elif _gives_no_name(path, query):
                return Target("", None, error=BadRequest("Parameter model_name is required."), reads_form=True)
        version = None if version is None else _as_text(version)
        if path.startswith(_KSERVE):
            return self.named_target(name, version, flags)
        return self.version_target(name, version, rest, flags)

    def named_target(self, name: str, version: str | None, flags: int) -> Target:
        """Returns the target of a request to a model, or to the workflow of that name where there is no such model.

        No version is the default one.
        """
        if version is None and not flags & RequestFlag.EXPLAIN and self._names_workflow(name):
            return self.workflow_target(name, flags)
        return self.version_target(name, version, flags=flags)

    def _names_workflow(self, name: str) -> bool:
        return self._workflow_names and name in self._graphs and name not in self._models

    def version_target(self, name: str, version: str | None, rest: str = "", flags: int = 0) -> Target:
        """Returns the target of a request to a named model.

        No version is the default one; `rest` stands behind it in the path, as latin-1 of UTF-8 bytes.
        """
        if rest:
            return self._target(name, version, rest, flags)
        asked = name, version, flags
        target = self._targets.get(asked)
        if target is None:
            target = self._target(name, version, rest, flags)
            if target.error is None:  # else there would be no bound: clients may ask for any name
                self._targets[asked] = target
        return target

    def _target(self, name: str, version: str | None, rest: str, flags: int) -> Target:
        model = self._models.get(name)
        if model is None:
            return Target(name, version, error=ModelNotFound.named(name))
        wanted = model["default"] if version is None else version
        entry = model["versions"].get(wanted)
        if entry is None:
            return Target(name, version, error=ModelVersionNotFound.named(name, wanted))
        if "function" in entry:
            flags |= RequestFlag.FUNCTION | (entry["row"] + 1) << RequestFlag.ROW_SHIFT
        batchers = tuple(int(index) for index, workers in entry["batchers"].items() if workers > 0)
        if not batchers:
            error = ServiceUnavailable.no_worker(name, version)
            return Target(name, version, entry["index"], flags=flags, error=error)
        timeout_ms = entry["client_timeout_ms"]
        if version is not None:
            flags |= RequestFlag.VERSION_NAMED
        url_path = rest.encode("latin-1")
        if "function" in entry:
            url_path = entry["function"].encode()
        special = entry["sequences"]
        where = entry["index"], batchers, url_path
        return Target(name, version, *where, flags, timeout_ms, entry["continuous"], is_special=special)

    def node_target(self, name: str, version: str | None) -> Target:
        """Returns the target of a request from one node of a workflow to another, at this model."""
        return self.version_target(name, version, flags=RequestFlag.REFERENCES)

    def workflow_target(self, name: str, flags: int = 0) -> Target:
        """Returns the target of a request to a workflow: its first node's, with its graph."""
        graph = self._graphs.get(name)
        if graph is None and name in self._graphs:
            return Target(name, None, error=ServiceUnavailable(f"Workflow {name} is being loaded. Please try again."))
        if graph is None:
            return Target(name, None, error=WorkflowNotFound(f"Workflow not found: {name}"))
        start = graph.nodes[graph.start]
        first = self.version_target(start.model, start.version, flags=flags)
        if first.error is not None:
            error: ServerError = InternalServerError(start.model)
            if isinstance(first.error, ServiceUnavailable):
                error = ServiceUnavailable.busy_node(start.model)
            return Target(name, None, error=error, graph=graph)
        return replace(first, client_timeout_ms=start.timeout_ms, graph=graph, is_special=True)

    def form_target(self, content_type: bytes, body: bytes) -> Target:
        """Returns the target of an `/invocations` request whose model is named by a field of its form."""
        name = form_field(content_type, body, "model_name")
        if name is None:
            return Target("", None, error=BadRequest("Parameter model_name is required."))
        return self.version_target(name, None, flags=RequestFlag.QUERY_ROW)

    def rows(self) -> list[tuple[int, tuple[int, ...]]]:
        """Returns the number of each model version on the board, and the batchers that have workers of it."""
        return [
            (entry["index"], tuple(map(int, entry["batchers"])))
            for model in self._models.values()
            for entry in model["versions"].values()
        ]

    def versions(self, name: str) -> tuple[str, dict[str, bool]]:
        """Returns a model's default version, and of each of its versions whether a worker is ready.

        Raises:
            ModelNotFound: no such model.
        """
        if self._names_workflow(name):
            return DEFAULT_VERSION, {DEFAULT_VERSION: self._is_ready(self._graphs[name])}
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound.named(name)
        return model["default"], {version: entry["loaded"] for version, entry in model["versions"].items()}

    def default_version(self, name: str) -> str | None:
        """Returns a model's default version; None where there is no such model."""
        model = self._models.get(name)
        return None if model is None else str(model["default"])

    def workflow_ready(self, name: str) -> bool | None:
        """Returns whether all nodes of a workflow have a ready worker; None where the name is no workflow's."""
        return self._is_ready(self._graphs[name]) if self._names_workflow(name) else None

    def _is_ready(self, graph: Graph | None) -> bool:
        if graph is None:
            return False
        for name, version in graph.needed:
            model = self._models.get(name)
            entry = None if model is None else model["versions"].get(version or model["default"])
            if entry is None or not entry["loaded"]:
                return False
        return True


def _gives_no_name(path: str, query: str) -> bool:
    """Whether a request whose path and query name no model says nothing of one: an empty name is that of no model."""
    return path.startswith("/invocations") and "model_name" not in parse_qs(query, keep_blank_values=True)


def _workflow_in(path: str) -> str | None:
    """The workflow that a path names, whatever stands behind it; None where it is no such path."""
    parts = path.split("/")
    if len(parts) < _WORKFLOW_PARTS or parts[1].lower() != "wfpredict" or not parts[2]:
        return None
    return parts[2]


def _as_text(part: str) -> str:
    """Returns a path segment as text: WSGI hands it on as latin-1 of UTF-8 bytes."""
    return part.encode("latin-1").decode("utf-8", "replace")
