"""What can be done with workflows: register, describe, list, unregister.

Each operation takes the arguments of the control socket and returns `{"status": HTTP status, "body": JSON}`, word for
word what the REST API answers, or raises a ServerError. The nodes of a workflow are models, registered and unregistered
by the models' manager; here is what belongs to them together.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsgi_ts.archive.download import DownloadRules
from wsgi_ts.errors import (
    BadRequest,
    ConflictStatus,
    InternalServerError,
    InvalidDag,
    ServerError,
    ServiceUnavailable,
    WorkflowNotFound,
)
from wsgi_ts.messages import FUNCTION_FAILED
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.settings.config import Config
from wsgi_ts.workflows.arguments import WorkflowArguments
from wsgi_ts.workflows.compile import CompiledWorkflow, compile_workflow, model_name
from wsgi_ts.workflows.spec import Node, WorkflowSpec
from wsgi_ts.workflows.war import (
    WorkflowDirectory,
    open_workflow,
    remove_downloaded_workflow,
    remove_workflow_directory,
)

log = logging.getLogger(__name__)

#: Nodes that are registered at a time, as in TorchServe.
MOST_AT_ONCE = 4
#: A workflow that is unregistered is quiet when none of its nodes has had a request for so long, in seconds.
_QUIET_S = 0.1
_LOOK_S = 0.01
_WORKERS_FAILED = "Failed to start workers for model "


@dataclass(frozen=True, slots=True)
class Workflow:
    """A registered workflow.

    Attributes:
        directory: its files.
        spec: its specification.
        compiled: what came of that.
        arguments: the call that registered it.
    """

    directory: WorkflowDirectory
    spec: WorkflowSpec
    compiled: CompiledWorkflow
    arguments: WorkflowArguments

    @property
    def name(self) -> str:
        """The workflow's name."""
        return self.directory.name

    @property
    def record(self) -> dict[str, Any]:
        """What is to be known of it at the next start."""
        fetched = self.directory.downloaded
        return {
            "warName": os.path.basename(self.directory.url) if fetched is None else fetched.name,
            "downloaded": fetched is not None,
            "responseTimeout": self.arguments.response_timeout,
            "startupTimeout": self.arguments.startup_timeout,
        }


class WorkflowManager:
    """The operations on the workflows of one instance.

    Args:
        config: the configuration.
        registry: what is registered.
        models: the operations on models.
        workflows_dir: where archives are unpacked.
        publish: makes the registry's present state known to the data path.
        outstanding: how many requests of a version are under way.
        record: writes the snapshot; called after each change, before it is answered.
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
    ) -> None:
        self._config = config
        self._registry = registry
        self._models = models
        self._workflows_dir = workflows_dir
        self._publish = publish
        self._outstanding = outstanding
        self._record = record
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._workflows: dict[str, Workflow] = {}

    def register(self, *, at_startup: bool = False, fetched: bool = False, **given: Any) -> dict[str, Any]:
        """Registers a workflow and all its nodes, and answers when their workers are ready.

        If one of them fails, none of them stays.

        Args:
            at_startup: the configuration or a snapshot names this workflow.
            fetched: its archive was fetched into the store, and goes with it.
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
            rules=DownloadRules(self._config.allowed_urls, s3_sse_kms=arguments.s3_sse_kms),
            workflow_name=arguments.workflow_name or None,
        )
        if fetched and self._config.workflow_store is not None:
            directory = replace(directory, downloaded=self._config.workflow_store / os.path.basename(directory.url))
        try:
            spec = directory.read_spec()
            workflow = Workflow(directory, spec, compile_workflow(directory.name, spec), arguments)
            if workflow.compiled.functions and directory.handler_file is None:
                functions = ", ".join(workflow.compiled.functions)
                raise InvalidDag(f"The archive names no handler, which would hold the functions {functions}")
            with self._alone_with(workflow.name):
                if workflow.name in self._workflows:
                    raise ConflictStatus(f"Workflow {workflow.name} is already registered.")
                self._register(workflow)
        except BaseException:
            # At a start the next one tries it again.
            _discard(replace(directory, downloaded=None) if fetched else directory)
            raise
        if not at_startup:
            self._record()
        log.info("Workflow %s registered from %s", workflow.name, directory.url)
        return _status(f"Workflow {workflow.name} has been registered and scaled successfully.")

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
        }
        return {"status": 200, "body": [description]}

    def list_workflows(self, *, limit: int, next_page_token: int) -> dict[str, Any]:
        """Lists `limit` workflows by name, from number `next_page_token` on."""
        with self._lock:
            found = [self._workflows[name] for name in sorted(self._workflows)]
        end = next_page_token + limit
        body: dict[str, Any] = {"nextPageToken": str(end)} if end <= len(found) else {}
        page = found[next_page_token:end]
        body["workflows"] = [{"workflowName": each.name, "workflowUrl": each.directory.url} for each in page]
        return {"status": 200, "body": body}

    def unregister(self, *, workflow_name: str) -> dict[str, Any]:
        """Takes a workflow off the data path, and its nodes when their requests are answered."""
        self._registry.refuse_while_draining()
        with self._alone_with(workflow_name):
            workflow = self._get(workflow_name)
            with self._registry.changed:
                self._registry.remove_workflow(workflow.name)
                self._publish()
            with self._lock:
                del self._workflows[workflow.name]
            self._wait_until_quiet(workflow.name)
            failures = [*self._missing(workflow), *self._unregister_nodes(workflow.name)]
        _discard(workflow.directory)
        self._record()
        if failures:
            raise InternalServerError(
                f"Error while unregistering the workflow {workflow.name}. Details: {', '.join(failures)}"
            )
        log.info("Workflow %s unregistered", workflow.name)
        return _status(f'Workflow "{workflow.name}" unregistered')

    def is_ready(self, name: str) -> bool | None:
        """Whether all nodes of a workflow have workers, as KServe asks it; None where there is none of that name."""
        with self._lock:
            if name not in self._workflows or not self._config.workflow_names:
                return None
        return all(model.workers for model in self._registry.nodes_of(name))

    def _get(self, name: str) -> Workflow:
        with self._lock:
            if name not in self._workflows:
                raise WorkflowNotFound(f"Workflow not found: {name}")
            return self._workflows[name]

    @contextmanager
    def _alone_with(self, name: str) -> Iterator[None]:
        """A name with which nobody else does anything meanwhile.

        Raises:
            ConflictStatus: somebody does.
        """
        with self._lock:
            if name in self._busy:
                raise ConflictStatus(f"Workflow {name} is already registered.")
            self._busy.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(name)

    # -- nodes

    def _register(self, workflow: Workflow) -> None:
        """Registers the nodes, and then the workflow.

        Raises:
            InternalServerError: not all nodes could be; none of them is left.
        """
        failures = self._register_nodes(workflow)
        if failures:
            text = f"Workflow {workflow.name} has failed to register. Failures: [{', '.join(failures)}]"
            left = self._unregister_nodes(workflow.name)
            if left:
                text += f"Error while doing rollback of failed workflow. Details{', '.join(left)}"
            log.error("%s", text)
            raise InternalServerError(text, type_name="WorkflowException")
        with self._lock:
            self._workflows[workflow.name] = workflow
        with self._registry.changed:
            self._registry.set_workflow(workflow.name, workflow.compiled.graph.to_json(), workflow.record)
            self._publish()

    def _register_nodes(self, workflow: Workflow) -> list[str]:
        """Registers them side by side; returns what went wrong, in the order of the file."""
        tasks: list[Callable[[], list[str]]] = []
        tasks += [lambda node=node: self._register_model(workflow, node) for node in workflow.compiled.models]  # type: ignore[misc]
        tasks += [lambda node=node: self._find_shared(workflow, node) for node in workflow.compiled.shared]  # type: ignore[misc]
        if workflow.compiled.functions:
            tasks.append(lambda: self._register_functions(workflow))
        with ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="workflow") as pool:
            return [failure for failures in pool.map(lambda task: task(), tasks) for failure in failures]

    def _register_model(self, workflow: Workflow, node: Node) -> list[str]:
        name, numbers, arguments = model_name(workflow.name, node.name), node.numbers, workflow.arguments
        try:
            if node.url is None:
                raise BadRequest(f"Model {node.name} has no url.")
            self._models.register(
                workflow=workflow.name,
                url=node.url,
                model_name=name,
                batch_size=numbers.batch_size,
                max_batch_delay=numbers.max_batch_delay_ms,
                initial_workers=max(0, numbers.max_workers),
                response_timeout=arguments.response_timeout,
                startup_timeout=arguments.startup_timeout,
            )
        except Exception as error:
            failure = _failure(name, error)
            if not node.options.optional:
                return [failure]
            log.warning("Workflow %s goes without its optional node: %s", workflow.name, failure)
        return []

    def _find_shared(self, workflow: Workflow, node: Node) -> list[str]:
        shared = node.options.model
        if shared is None or node.options.optional:
            return []
        try:
            self._registry.get(shared.name, shared.version)
        except ServerError as error:
            return [_failure(model_name(workflow.name, node.name), error)]
        return []

    def _register_functions(self, workflow: Workflow) -> list[str]:
        directory, arguments, functions = workflow.directory, workflow.arguments, workflow.compiled.functions
        handler = directory.handler_file
        assert handler is not None
        try:
            self._models.register_functions(
                workflow.name,
                directory.path,
                directory.url,
                str(handler.relative_to(directory.path)),
                functions,
                response_timeout=arguments.response_timeout,
                startup_timeout=arguments.startup_timeout,
            )
        except Exception as error:
            return [_failure(functions[key]["model"], error) for key in self._failed_functions(workflow)]
        return []

    def _failed_functions(self, workflow: Workflow) -> list[str]:
        """The functions that could not be loaded, by what their worker has said last; all if it said nothing."""
        functions = workflow.compiled.functions
        for model in self._registry.nodes_of(workflow.name):
            named = [
                line.removeprefix(FUNCTION_FAILED) for line in model.load_lines if line.startswith(FUNCTION_FAILED)
            ]
            if model.spec.functions and named:
                return [key for key in functions if key == named[-1]]
        return list(functions)

    def _missing(self, workflow: Workflow) -> list[str]:
        """What is said of nodes that somebody has unregistered."""
        names = [model_name(workflow.name, node.name) for node in workflow.compiled.models]
        there = {model.name for model in self._registry.nodes_of(workflow.name)}
        wanted = [name for name in names if name not in there]
        wanted += [
            function["model"]
            for function in workflow.compiled.functions.values()
            if self._registry.function_host(function["model"]) is None
        ]
        optional = {
            model_name(workflow.name, node.name) for node in workflow.spec.nodes.values() if node.options.optional
        }
        return [f"Model not found: {name}" for name in wanted if name not in optional]

    def _unregister_nodes(self, workflow: str) -> list[str]:
        """Unregisters what a workflow has registered; returns what went wrong."""
        nodes = self._registry.nodes_of(workflow)
        with ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="workflow") as pool:
            return [failure for failure in pool.map(self._unregister_node, nodes) if failure]

    def _unregister_node(self, model: ModelVersion) -> str:
        try:
            self._models.unregister(model_name=model.name, version=model.version)
        except ServerError as error:
            log.error("Node %s cannot be unregistered: %s", model.name, error.message)
            return error.message
        return ""

    def _wait_until_quiet(self, workflow: str) -> None:
        """Waits until the requests under way are answered; a node more may still follow on each answer."""
        deadline = time.monotonic() + self._config.unregister_model_timeout
        quiet_since = time.monotonic()
        while (now := time.monotonic()) - quiet_since < _QUIET_S and now < deadline:
            if any(self._outstanding(model) for model in self._registry.nodes_of(workflow)):
                quiet_since = time.monotonic()
            time.sleep(_LOOK_S)


def _failure(name: str, error: Exception) -> str:
    """What TorchServe says of a node that could not be registered."""
    if isinstance(error, ServiceUnavailable):
        raise error
    message = error.message if isinstance(error, ServerError) else str(error)
    if not isinstance(error, ServerError):
        log.error("Node %s cannot be registered", name, exc_info=error)
    if message.startswith(_WORKERS_FAILED):
        return f"{_WORKERS_FAILED}{name} version: {message.rpartition(' ')[2]}"
    return f"Workflow Node {name} failed to register. Details: {message}"


def _discard(directory: WorkflowDirectory) -> None:
    """Removes the files of a workflow that is not registered (any more), the downloaded archive included."""
    try:
        remove_workflow_directory(directory)
        remove_downloaded_workflow(directory)
    except OSError as error:
        log.warning("Cannot remove the unpacked workflow %s: %s", directory.path, error)


def _status(text: str) -> dict[str, Any]:
    return {"status": 200, "body": {"status": text}}
