"""What can be done with workflows: register, describe, list, unregister.

Each operation takes the arguments of the control socket and returns `{"status": HTTP status, "body": JSON}`, word for
word what the REST API answers, or raises a ServerError. The nodes of a workflow are models, registered and unregistered
by the models' manager; here is what belongs to them together.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsgi_ts.archive.download import DownloadRules, Fetchers
from wsgi_ts.dataplane.graph import Graph
from wsgi_ts.errors import BadRequest, ConflictStatus, InternalServerError, ServerError, WorkflowNotFound
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.settings.config import Config
from wsgi_ts.workflows.arguments import WorkflowArguments
from wsgi_ts.workflows.compile import compile_workflow
from wsgi_ts.workflows.nodes import WorkflowNodes
from wsgi_ts.workflows.war import discard_workflow, open_workflow
from wsgi_ts.workflows.workflow import Workflow

log = logging.getLogger(__name__)


class WorkflowManager:
    """The operations on the workflows of one instance.

    Args:
        publish: makes the registry's present state known to the data path.
        outstanding: how many requests of a version are under way.
        record: writes the snapshot; called after each change, before it is answered.
        fetchers: plugins that fetch archives; None for none.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        models: ModelManager,
        workflows_dir: Path,
        *,
        publish: Callable[[], None],
        outstanding: Callable[[ModelVersion], int],
        record: Callable[[], None] = lambda: None,
        fetchers: Fetchers | None = None,
    ) -> None:
        self._config = config
        self._registry = registry
        self._models = models
        self._nodes = WorkflowNodes(registry, models, outstanding, config.unregister_model_timeout)
        self._workflows_dir = workflows_dir
        self._publish = publish
        self._record = record
        self._fetchers = fetchers
        self._lock = threading.Lock()
        #: The names that something is being done with, and what.
        self._busy: dict[str, str] = {}
        self._workflows: dict[str, Workflow] = {}
        self._number = 0

    def register(
        self,
        *,
        at_startup: bool = False,
        fetched: bool = False,
        fetched_models: Mapping[str, str] | None = None,
        scaled: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """Registers a workflow and all its nodes, and answers when their workers are ready.

        If one of them fails, none of them stays.

        Args:
            at_startup: the configuration or a snapshot names this workflow.
            fetched: its archive was fetched into the store, and goes with it.
            fetched_models: nodes by name, each with the file of the model store that was fetched for it before.
            scaled: nodes by name, each with the `minWorkers` and `maxWorkers` that it was scaled to.
            given: the fields of WorkflowArguments.
        """
        self._registry.refuse_while_draining()
        arguments = WorkflowArguments.checked(given)
        if not self._config.workflow_registration and not at_startup:
            raise BadRequest("Registering new workflows is disabled.")
        directory = open_workflow(
            arguments.url or "",
            self._config.workflow_store,
            self._workflows_dir,
            rules=DownloadRules(self._config.allowed_urls, s3_sse_kms=arguments.s3_sse_kms, fetchers=self._fetchers),
            workflow_name=arguments.workflow_name or None,
        )
        if fetched and self._config.workflow_store is not None:
            directory = replace(directory, downloaded=self._config.workflow_store / os.path.basename(directory.url))
        name = directory.name
        try:
            with self._alone_with(name, "registered"):
                before = self._workflows.get(name)
                if before is not None and not arguments.replace:
                    Workflow.of(directory, arguments, name)  # what is wrong with it is told first
                    raise ConflictStatus(f"Workflow {name} is already registered.")
                workflow = Workflow.of(directory, arguments, self._key_of(name, is_new=before is None))
                self._register(workflow, before, fetched_models or {})
                self._nodes.scale(workflow, scaled or {})
                if before is not None:
                    self._take_over(before, workflow)
        except BaseException:
            # At a start the next one tries it again.
            discard_workflow(replace(directory, downloaded=None) if fetched else directory)
            raise
        if not at_startup:
            self._record()
        log.info("Workflow %s registered from %s", name, directory.url)
        return _status(f"Workflow {name} has been registered and scaled successfully.")

    def describe(self, *, workflow_name: str) -> dict[str, Any]:
        """Describes a workflow: its global numbers and its graph."""
        workflow = self._get(workflow_name)
        numbers = workflow.spec.numbers
        description = {
            "workflowName": workflow.name,
            "workflowUrl": workflow.directory.url,
            "minWorkers": numbers.min_workers,
            "maxWorkers": numbers.max_workers,
            "batchSize": numbers.batch_size,
            "maxBatchDelay": numbers.max_batch_delay_ms,
            "workflowDag": workflow.spec.dag_text,
            "longestMs": workflow.longest.ms,
        }
        return {"status": 200, "body": [description]}

    def list_workflows(self, *, limit: int, next_page_token: int) -> dict[str, Any]:
        """Lists `limit` workflows by name, from number `next_page_token` on."""
        found = self._sorted()
        end = next_page_token + limit
        body: dict[str, Any] = {"nextPageToken": str(end)} if end <= len(found) else {}
        page = found[next_page_token:end]
        body["workflows"] = [{"workflowName": each.name, "workflowUrl": each.directory.url} for each in page]
        return {"status": 200, "body": body}

    def status(self) -> list[dict[str, Any]]:
        """The lines of `wsgi-ts status`."""
        rows = []
        for workflow in self._sorted():
            compiled = workflow.compiled
            graph = self._registry.workflows.graphs().get(workflow.name)
            waiting = [] if graph is None else self._missing(workflow.name, graph)
            rows.append(
                {
                    "workflow": workflow.name,
                    "url": workflow.directory.url,
                    "nodes": len(workflow.spec.nodes),
                    "models": len(compiled.models),
                    "shared_models": len(compiled.shared),
                    "functions": len(compiled.functions),
                    "longest_ms": workflow.longest.ms,
                    "ready": graph is not None and not waiting,
                    "not_ready": waiting,
                }
            )
        return rows

    def unregister(self, *, workflow_name: str) -> dict[str, Any]:
        """Takes a workflow off the data path, and its nodes when their requests are answered."""
        self._registry.refuse_while_draining()
        if self._leave_out(workflow_name):
            self._record()
            return _status(f'Workflow "{workflow_name}" unregistered')
        self._get(workflow_name)
        with self._alone_with(workflow_name, "unregistered"):
            workflow = self._get(workflow_name)
            with self._registry.changed:
                self._registry.workflows.remove(workflow.name)
                self._publish()
            with self._lock:
                del self._workflows[workflow.name]
            self._nodes.wait_until_quiet(workflow.key)
            failures = [*self._nodes.missing(workflow), *self._nodes.unregister(workflow.key)]
            self._registry.remove_aliases(workflow.models_named(workflow.key))
        discard_workflow(workflow.directory)
        self._record()
        if failures:
            raise InternalServerError(
                f"Error while unregistering the workflow {workflow.name}. Details: {', '.join(failures)}"
            )
        log.info("Workflow %s unregistered", workflow.name)
        return _status(f'Workflow "{workflow.name}" unregistered')

    def is_ready(self, name: str) -> bool | None:
        """Whether a workflow answers, as KServe asks it; None where there is none of that name.

        It says what the data path says of it (`RoutingTable.workflow_ready`).
        """
        routes = self._registry.workflows.routes()
        if name not in routes or not self._config.workflow_names:
            return None
        graph = routes[name]
        return graph is not None and not self._missing(name, graph)

    def _missing(self, name: str, graph: Mapping[str, Any]) -> list[str]:
        """The models that a workflow needs, as its graph is published, and that are not ready."""
        needed = Graph.from_json(name, graph).needed
        return [model for model, version in needed if not self._is_loaded(model, version)]

    def _is_loaded(self, name: str, version: str | None) -> bool:
        """Whether a worker of a model is ready, of a function one of its host."""
        try:
            model = self._registry.function_host(name) or self._registry.get(name, version)
        except ServerError:
            return False
        return model.is_ready and not model.unloading

    def _leave_out(self, name: str) -> bool:
        """Has the snapshots leave out a workflow that could not be restored; false where there is no such one.

        Raises:
            ConflictStatus: its turn is still to come.
        """
        if self._registry.workflows.is_expected(name):
            raise ConflictStatus(f"Workflow {name} is being registered; try again when that is done.")
        with self._lock:
            if name in self._workflows or name not in self._registry.workflows.records():
                return False
        with self._alone_with(name, "unregistered"):
            record = self._registry.workflows.forget(name)
        if record is None:
            return False
        log.info("Workflow %s, which could not be restored, is left out from now on", name)
        store = self._config.workflow_store
        if record.get("downloaded") and store is not None:
            archive = store / os.path.basename(str(record.get("warName")))
            with self._lock:
                used = [workflow.directory.downloaded for workflow in self._workflows.values()]
            if archive not in used:
                archive.unlink(missing_ok=True)
        return True

    def _sorted(self) -> list[Workflow]:
        with self._lock:
            return [self._workflows[name] for name in sorted(self._workflows)]

    def _get(self, name: str) -> Workflow:
        with self._lock:
            if name not in self._workflows:
                raise WorkflowNotFound(f"Workflow not found: {name}")
            return self._workflows[name]

    @contextmanager
    def _alone_with(self, name: str, done: str) -> Iterator[None]:
        """Holds a workflow's name for one operation at a time; `done` is what is being done with it.

        Raises:
            ConflictStatus: somebody does.
        """
        with self._lock:
            if name in self._busy:
                raise ConflictStatus(f"Workflow {name} is being {self._busy[name]}; try again when that is done.")
            self._busy[name] = done
        try:
            yield
        finally:
            with self._lock:
                del self._busy[name]

    def _key_of(self, name: str, *, is_new: bool) -> str:
        """What the nodes of a workflow are registered for: its name, or beside a present one another that none has.

        Raises:
            ConflictStatus: the nodes of another workflow are registered for this name.
        """
        keys = self._registry.workflows.keys()
        if is_new:
            if name in keys.values():
                raise ConflictStatus(
                    f"Workflow {name} cannot be registered: another one has its nodes under that name."
                )
            return name
        while True:
            self._number += 1
            key = f"{name}~{self._number}"
            if key not in keys and key not in keys.values():
                return key

    def _register(self, workflow: Workflow, before: Workflow | None, fetched: Mapping[str, str]) -> None:
        """Registers the nodes, and then the workflow.

        Raises:
            InternalServerError: not all nodes could be; none of them is left.
        """
        taken = [] if before is None else self._nodes.taken_names(before, workflow)
        failures = taken or self._nodes.register(workflow, fetched)
        if failures:
            listed = ", ".join(failures).replace(f"{workflow.key}__", f"{workflow.name}__")
            left = self._nodes.unregister(workflow.key)
            if left:
                listed += f", Error while doing rollback of failed workflow. Details{', '.join(left)}"
            text = f"Workflow {workflow.name} has failed to register. Failures: [{listed}]"
            log.error("%s", text)
            raise InternalServerError(text, type_name="WorkflowException")
        with self._lock:
            self._workflows[workflow.name] = workflow
        with self._registry.changed:
            self._registry.workflows.set(
                workflow.name, workflow.key, workflow.compiled.graph.to_json(), workflow.record
            )
            self._publish()

    def _take_over(self, before: Workflow, after: Workflow) -> None:
        """Ends a workflow that another has replaced: no request of it is lost, and the names are the other's then."""
        self._nodes.wait_until_quiet(before.key)
        name, registry = after.name, self._registry
        graph = compile_workflow(name, after.spec).graph
        with registry.changed:
            registry.remove_aliases(before.models_named(before.key))
            for old, new in self._nodes.moves(before.key, name, f"{name}~retired"):
                registry.rename(old, new)
            for old, new in self._nodes.moves(after.key, after.key, name):
                registry.rename(old, new)
                # Requests under way know the nodes by the names that they had until now.
                registry.alias(old, new)
            registry.workflows.set(name, after.key, graph.to_json(), after.record)
            self._publish()
        for model in registry.nodes_of(after.key):
            self._models.workers.renew(model, model.spec)
        for failure in self._nodes.unregister(before.key):
            log.error("A node of the workflow %s that was replaced is left: %s", name, failure)
        kept = before.directory.downloaded == after.directory.downloaded
        discard_workflow(replace(before.directory, downloaded=None) if kept else before.directory)


def _status(text: str) -> dict[str, Any]:
    return {"status": 200, "body": {"status": text}}
