"""MANIFEST.json, in the order of TorchServe's archivers; what is not given is left out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION

WORKFLOW_ARCHIVER_VERSION = "0.2.15"


class RuntimeType(Enum):
    """What runs a handler."""

    PYTHON = "python"
    PYTHON3 = "python3"
    LSP = "LSP"


class _Document:
    """A part of a manifest: a dict, shown as JSON."""

    def __to_dict__(self) -> dict[str, Any]:
        raise NotImplementedError

    def text(self) -> str:
        """Returns the document as an archive has it."""
        return json.dumps(self.__to_dict__(), indent=2)

    def __str__(self) -> str:
        return json.dumps(self.__to_dict__())

    __repr__ = __str__


def _now() -> str:
    return datetime.now().strftime("%d/%m/%Y %H:%M:%S")


def _base(path: str | None) -> str:
    return os.path.basename(path or "")


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value}


@dataclass(repr=False)
class Model(_Document):
    """The manifest's entry `model`; of paths the file's name counts."""

    model_name: str
    serialized_file: str | None = None
    handler: str | None = None
    model_file: str | None = None
    model_version: str | None = None
    extensions: dict[str, Any] | None = None
    requirements_file: str | None = None
    config_file: str | None = None

    def __post_init__(self) -> None:
        self.serialized_file = _base(self.serialized_file) or None
        self.handler = _base(self.handler) or None
        self.model_file = _base(self.model_file) or None
        self.requirements_file = _base(self.requirements_file) or None
        self.config_file = _base(self.config_file) or None

    def __to_dict__(self) -> dict[str, Any]:
        return _given(
            {
                "modelName": self.model_name,
                "serializedFile": self.serialized_file,
                "handler": self.handler,
                "modelFile": self.model_file,
                "modelVersion": self.model_version,
                "extensions": self.extensions,
                "requirementsFile": self.requirements_file,
                "configFile": self.config_file,
            }
        )


@dataclass(repr=False)
class Manifest(_Document):
    """The manifest of a model archive.

    Raises:
        ValueError: there is no such runtime.
    """

    runtime: str
    model: Model
    creation_time: str = field(default_factory=_now, init=False)

    def __post_init__(self) -> None:
        self.runtime = RuntimeType(self.runtime).value

    def __to_dict__(self) -> dict[str, Any]:
        return {
            "createdOn": self.creation_time,
            "runtime": self.runtime,
            "model": self.model.__to_dict__(),
            "archiverVersion": TORCHSERVE_VERSION,
        }


@dataclass(repr=False)
class Workflow(_Document):
    """The manifest's entry `workflow`; of paths the file's name counts."""

    workflow_name: str
    spec_file: str
    handler: str | None = None

    def __post_init__(self) -> None:
        self.spec_file = _base(self.spec_file)
        self.handler = _base(self.handler) or None

    def __to_dict__(self) -> dict[str, Any]:
        return _given({"workflowName": self.workflow_name, "specFile": self.spec_file, "handler": self.handler})


@dataclass(repr=False)
class WorkflowManifest(_Document):
    """The manifest of a workflow archive."""

    workflow: Workflow
    creation_time: str = field(default_factory=_now, init=False)

    def __to_dict__(self) -> dict[str, Any]:
        return {
            "createdOn": self.creation_time,
            "workflow": self.workflow.__to_dict__(),
            "archiverVersion": WORKFLOW_ARCHIVER_VERSION,
        }

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__
