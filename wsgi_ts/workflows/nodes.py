"""The nodes of workflows as models: registered side by side, unregistered together, and what goes wrong in words."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from wsgi_ts.errors import BadRequest, ServerError, ServiceUnavailable
from wsgi_ts.messages import FUNCTION_FAILED
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.workflows.compile import model_name
from wsgi_ts.workflows.spec import Node
from wsgi_ts.workflows.workflow import Workflow

log = logging.getLogger(__name__)

#: Nodes that are registered at a time, as in TorchServe.
MOST_AT_ONCE = 4
#: The nodes of a workflow are quiet when none of them has had a request for so long, in seconds.
_QUIET_S = 0.1
_LOOK_S = 0.01
_WORKERS_FAILED = "Failed to start workers for model "


@dataclass(frozen=True, slots=True)
class WorkflowNodes:
    """Registers and unregisters the nodes of workflows.

    Attributes:
        outstanding: how many requests of a version are under way.
        unregister_limit_s: how long the requests under way may take at the end of a workflow.
    """

    registry: Registry
    models: ModelManager
    outstanding: Callable[[ModelVersion], int]
    unregister_limit_s: float

    def register(self, workflow: Workflow, fetched: Mapping[str, str]) -> list[str]:
        """Registers them side by side; returns what went wrong, in the order of the file.

        `fetched`: files of the model store that were fetched for nodes, by name, at an earlier start.
        """
        compiled = workflow.compiled
        tasks = [partial(self._register_model, workflow, node, fetched.get(node.name, "")) for node in compiled.models]
        tasks += [partial(self._find_shared, workflow, node) for node in compiled.shared]
        if compiled.functions:
            tasks.append(partial(self._register_functions, workflow))
        with ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="workflow") as pool:
            return [failure for failures in pool.map(lambda task: task(), tasks) for failure in failures]

    def scale(self, workflow: Workflow, scaled: Mapping[str, Any]) -> None:
        """Gives nodes the workers that they had at the last start; one that cannot have them is told in the log."""
        there = {model.name for model in self.registry.nodes_of(workflow.key)}
        for node, limits in scaled.items():
            name = model_name(workflow.key, node)
            if name not in there:
                continue
            try:
                least, most = (max(0, int(limits[key])) for key in ("minWorkers", "maxWorkers"))
                self.models.scale(model_name=name, min_worker=least, max_worker=max(least, most), synchronous=True)
            except (ServerError, KeyError, TypeError, ValueError) as error:
                message = error.message if isinstance(error, ServerError) else f"{limits!r} are no numbers of workers"
                log.error("Node %s cannot be scaled as it was before the start: %s", name, message)

    def unregister(self, workflow: str) -> list[str]:
        """Unregisters what a workflow has registered; returns what went wrong."""
        nodes = self.registry.nodes_of(workflow)
        with ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="workflow") as pool:
            return [failure for failure in pool.map(self._unregister_node, nodes) if failure]

    def wait_until_quiet(self, workflow: str) -> None:
        """Waits until the requests under way are answered; a node more may still follow on each answer."""
        deadline = time.monotonic() + self.unregister_limit_s
        quiet_since = time.monotonic()
        while (now := time.monotonic()) - quiet_since < _QUIET_S and now < deadline:
            if any(self.outstanding(model) for model in self.registry.nodes_of(workflow)):
                quiet_since = time.monotonic()
            time.sleep(_LOOK_S)

    def missing(self, workflow: Workflow) -> list[str]:
        """The messages about nodes that somebody has unregistered."""
        there = {model.name for model in self.registry.nodes_of(workflow.key)}
        names = workflow.models_named(workflow.name)
        wanted = [name for name in names if name not in there and self.registry.function_host(name) is None]
        optional = {
            model_name(workflow.name, node.name) for node in workflow.spec.nodes.values() if node.options.optional
        }
        return [f"Model not found: {name}" for name in wanted if name not in optional]

    def moves(self, key: str, old_prefix: str, new_prefix: str) -> list[tuple[str, str]]:
        """The present names of a workflow's models and functions, and those with another prefix."""
        nodes = self.registry.nodes_of(key)
        names = [model.name for model in nodes]
        names += [function["model"] for model in nodes for function in model.spec.functions.values()]
        return [(name, new_prefix + name.removeprefix(old_prefix)) for name in names]

    def taken_names(self, before: Workflow, workflow: Workflow) -> list[str]:
        """The messages about names of a replacing workflow's nodes that other models have."""
        own = {old for old, _ in self.moves(before.key, "", "")}
        taken = [name for name in workflow.models_named(workflow.name) if name not in own and self.registry.has(name)]
        return [
            f"Workflow Node {name} failed to register. Details: A model is already registered with that name"
            for name in taken
        ]

    def _register_model(self, workflow: Workflow, node: Node, fetched: str) -> list[str]:
        name, numbers, arguments = model_name(workflow.key, node.name), node.numbers, workflow.arguments
        try:
            self.models.register(
                workflow=workflow.key,
                shown_name=model_name(workflow.name, node.name),
                fetched=fetched,
                url=node.url,
                model_name=name,
                batch_size=numbers.batch_size,
                max_batch_delay=numbers.max_batch_delay_ms,
                initial_workers=max(0, numbers.max_workers),
                response_timeout=arguments.response_timeout,
                startup_timeout=arguments.startup_timeout,
            )
            self._refuse_sequences(name, None)
        except Exception as error:
            failure = _failure(name, error)
            if not node.options.optional:
                return [failure]
            log.warning("Workflow %s goes without its optional node: %s", workflow.name, failure)
        return []

    def _refuse_sequences(self, name: str, version: str | None) -> None:
        """Refuses a model whose requests belong to sequences, which a workflow's do not.

        Raises:
            BadRequest: it is one.
            ServerError: there is no such model.
        """
        if self.registry.get(name, version).spec.sequence_batching:
            raise BadRequest("A model with sequenceBatching cannot be a node.")

    def _find_shared(self, workflow: Workflow, node: Node) -> list[str]:
        shared = node.options.model
        if shared is None or node.options.optional:
            return []
        try:
            self._refuse_sequences(shared.name, shared.version)
        except ServerError as error:
            return [_failure(model_name(workflow.name, node.name), error)]
        return []

    def _register_functions(self, workflow: Workflow) -> list[str]:
        directory, arguments, functions = workflow.directory, workflow.arguments, workflow.compiled.functions
        handler = directory.handler_file
        assert handler is not None
        try:
            self.models.register_functions(
                workflow.key,
                model_name(workflow.key, self._host_of_functions(workflow)),
                directory.path,
                directory.url,
                str(handler.relative_to(directory.path)),
                functions,
                shown=workflow.name,
                response_timeout=arguments.response_timeout,
                startup_timeout=arguments.startup_timeout,
            )
        except Exception as error:
            return [_failure(functions[key]["model"], error) for key in self._failed_functions(workflow)]
        return []

    def _host_of_functions(self, workflow: Workflow) -> str:
        """What the process of the functions is called among the nodes: as none of them, and as no other model."""
        present = self.registry.workflows.keys().get(workflow.name, workflow.key)
        own = {model.name for model in self.registry.nodes_of(present)}
        nodes = {*workflow.spec.nodes, *workflow.compiled.functions}
        name = "functions"
        while name in nodes or self._is_taken(model_name(workflow.name, name), own):
            name += "_"
        return name

    def _is_taken(self, name: str, own: set[str]) -> bool:
        """Whether another model than those that the workflow has now is called so."""
        return name not in own and self.registry.has(name)

    def _failed_functions(self, workflow: Workflow) -> list[str]:
        """The functions that could not be loaded, by what their worker has said last; all if it said nothing."""
        functions = workflow.compiled.functions
        for model in self.registry.nodes_of(workflow.key):
            named = [
                line.removeprefix(FUNCTION_FAILED) for line in model.load_lines if line.startswith(FUNCTION_FAILED)
            ]
            if model.spec.functions and named:
                return [key for key in functions if key == named[-1]]
        return list(functions)

    def _unregister_node(self, model: ModelVersion) -> str:
        try:
            self.models.unregister(model_name=model.name, version=model.version)
        except ServerError as error:
            log.error("Node %s cannot be unregistered: %s", model.name, error.message)
            return error.message
        return ""


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
