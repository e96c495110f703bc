"""The handler base classes that came before `BaseHandler`; old archives still derive from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from wsgi_ts.handlers.serving.context import Context


class ModelService(ABC):
    """A handler that keeps its context, and answers through `handle`."""

    def __init__(self, model_name: str = "", model_dir: str = "", manifest: Any = None, gpu: Any = None) -> None:
        self.model_name = model_name
        self.model_dir = model_dir
        self.manifest = manifest
        self.gpu = gpu
        self.context: Context | None = None

    def initialize(self, context: Context) -> None:
        """Keeps the context; a derived class loads its model here."""
        self.context = context

    @abstractmethod
    def preprocess(self, data: Any) -> Any:
        """Turns the B rows of a batch into the model's input."""

    @abstractmethod
    def inference(self, data: Any) -> Any:
        """Runs the model on what `preprocess` returned."""

    @abstractmethod
    def postprocess(self, data: Any) -> Any:
        """Turns the model's output into a list of B results."""

    def handle(self, data: Any, context: Context) -> Any:
        """Answers a batch of B rows with a list of B results."""
        self.context = context
        return self.postprocess(self.inference(self.preprocess(data)))


class SingleNodeService(ModelService):
    """A model service whose model is in this one process."""
