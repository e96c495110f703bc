"""A registered workflow: its files, its specification, and what was made of them."""

from __future__ import annotations

import os
from typing import Any

from wsgi_ts.errors import InvalidDag
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.workflows.arguments import WorkflowArguments
from wsgi_ts.workflows.compile import CompiledWorkflow, compile_workflow, model_name
from wsgi_ts.workflows.longest import Longest, longest
from wsgi_ts.workflows.spec import WorkflowSpec
from wsgi_ts.workflows.war import WorkflowDirectory


@dataclass(frozen=True, slots=True)
class Workflow:
    """A registered workflow.

    Attributes:
        directory: its files.
        spec: its specification.
        compiled: what came of that.
        arguments: the call that registered it.
        key: what its nodes are registered for; their models' names begin with it until they have their own.
    """

    directory: WorkflowDirectory
    spec: WorkflowSpec
    compiled: CompiledWorkflow
    arguments: WorkflowArguments
    key: str

    @classmethod
    def of(cls, directory: WorkflowDirectory, arguments: WorkflowArguments, key: str) -> Workflow:
        """The workflow in a directory.

        Raises:
            InternalServerError: there is no specification.
            InvalidWorkflow: it is no YAML.
            InvalidDag: it is no specification, or asks for what cannot be done.
        """
        spec = directory.read_spec()
        workflow = cls(directory, spec, compile_workflow(key, spec, directory.name), arguments, key)
        if workflow.compiled.functions and directory.handler_file is None:
            functions = ", ".join(workflow.compiled.functions)
            raise InvalidDag(f"The archive names no handler, which would hold the functions {functions}")
        return workflow

    def models_named(self, prefix: str) -> list[str]:
        """The names of its models and functions, where they begin so."""
        nodes = [model_name(prefix, node.name) for node in self.compiled.models]
        return [*nodes, *(model_name(prefix, key) for key in self.compiled.functions)]

    @property
    def name(self) -> str:
        """The workflow's name."""
        return self.directory.name

    @property
    def longest(self) -> Longest:
        """How long a request can take until it is answered."""
        return longest(self.compiled.graph)

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
