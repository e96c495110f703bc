"""The nodes of a workflow, loaded in this process: each with the modules of its own folder and none of another's."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from wsgi_ts.archive.model_directory import ModelDirectory, open_archive
from wsgi_ts.errors import ServerError
from wsgi_ts.handlers.serving.context import SendChunk
from wsgi_ts.handlers.serving.functions import FunctionHost
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.service import Service
from wsgi_ts.messages import ModelSpec
from wsgi_ts.models.arguments import RegisterArguments
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.preparation import ModelPreparer
from wsgi_ts.models.registry import Registry
from wsgi_ts.settings.config import Config
from wsgi_ts.workflows.compile import CompiledWorkflow, model_name
from wsgi_ts.workflows.source import Source
from wsgi_ts.workflows.spec import Node, NodeKind, WorkflowSpec


class RunError(Exception):
    """The workflow cannot be run, or has failed; the text is for the user."""


@dataclass(slots=True)
class _Loaded:
    """A node's handler.

    Attributes:
        path: `sys.path` as it has to be while it runs.
        batch_size: how many requests it is given at a time.
        is_async: whether it takes requests one by one, on an event loop.
        chunks: what it has streamed, by row.
    """

    service: Service
    folder: str
    path: list[str]
    batch_size: int
    is_async: bool
    chunks: dict[int, list[bytes]]
    modules: dict[str, ModuleType] = field(default_factory=dict)


class LocalNodes:
    """Loads nodes when they are first asked for, and runs them; archives are unpacked in `scratch`."""

    def __init__(
        self, source: Source, spec: WorkflowSpec, compiled: CompiledWorkflow, model_store: Path, scratch: Path
    ) -> None:
        self._source = source
        self._spec = spec
        self._functions = compiled.functions
        self._model_store = model_store
        self._scratch = scratch
        self._preparer = ModelPreparer(Config(), Registry(Numbers(0)), scratch, 0, in_process=True)
        self._loaded: dict[tuple[str, str | None], _Loaded | None] = {}

    def batch_size(self, node: str) -> int:
        """How many requests a loaded node is given at a time."""
        loaded = self._loaded[node, None]
        return 1 if loaded is None else loaded.batch_size

    def load(self, node: str, gate: str | None = None) -> bool:
        """Loads a node, or the function that says whether it runs; False for an optional one that cannot be loaded.

        Raises:
            RunError: it cannot be loaded.
        """
        key = (node, gate)
        if key not in self._loaded:
            try:
                self._loaded[key] = self._load(self._spec.nodes[node], gate)
            except RunError as error:
                if not self._spec.nodes[node].options.optional or gate is not None:
                    raise
                print(f"{error}; the node is optional, and skipped", file=sys.stderr)
                self._loaded[key] = None
        return self._loaded[key] is not None

    def run(self, node: str, gate: str | None, requests: list[Request]) -> list[bytes | None]:
        """Runs a loaded node on some requests; None for each that has failed, the reason is on standard error."""
        loaded = self._loaded[node, gate]
        assert loaded is not None
        loaded.chunks.clear()
        with _modules_of(loaded):
            if loaded.is_async:
                [request] = requests
                answered = loaded.service.answer(request, _collect(loaded.chunks))
                answers = [loaded.service.event_loop.run_until_complete(answered)]
            else:
                answers = loaded.service.predict(requests)
        bodies: list[bytes | None] = []
        for row, answer in enumerate(answers):
            body = bytes(answer.body)
            if answer.error:
                print(f"{node}: {answer.status} {body.decode('utf-8', 'replace')}", file=sys.stderr)
                bodies.append(None)
            elif row in loaded.chunks:
                # As in the server: of a stream a node behind it gets the first chunk, the client all.
                chunks = [*loaded.chunks[row], body]
                bodies.append(chunks[0] if self._spec.nodes[node].successors else b"".join(chunks))
            else:
                bodies.append(body)
        return bodies

    def close(self) -> None:
        """Ends what the handlers keep."""
        for loaded in self._loaded.values():
            if loaded is not None:
                loaded.service.close()

    def _load(self, node: Node, gate: str | None) -> _Loaded:
        name = f"{node.name}: the function {gate}" if gate else node.name
        if gate is not None or node.kind is NodeKind.FUNCTION:
            spec, is_function = self._function_spec(node, gate), True
        else:
            spec, is_function = self._model_spec(node), False
        loaded_path = list(sys.path)
        chunks: dict[int, list[bytes]] = {}
        try:
            if is_function:
                [service] = FunctionHost.load(spec, None, _collect(chunks)).services.values()
            else:
                service = Service.load(spec, _gpu(), _collect(chunks))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _put_away(spec.model_dir)
            sys.path[:] = loaded_path
            cause = error.__cause__ or error
            raise RunError(f"{name} cannot be loaded: {type(cause).__name__}: {cause}") from error
        batch_size = 1 if spec.async_communication or gate is not None else spec.batch_size
        loaded = _Loaded(service, spec.model_dir, list(sys.path), batch_size, spec.async_communication, chunks)
        loaded.modules = _put_away(spec.model_dir)
        sys.path[:] = loaded_path
        return loaded

    def _function_spec(self, node: Node, gate: str | None) -> ModelSpec:
        handler = self._source.handler_file
        if handler is None or not os.path.isfile(handler):
            missing = "no handler is given" if handler is None else f"there is no {handler.name}"
            raise RunError(f"{gate or node.name} is a function, but {missing}")
        key = f"when:{gate}" if gate else node.name
        return ModelSpec(
            index=0,
            name=self._source.name,
            version="1.0",
            model_dir=str(self._source.directory),
            handler=os.path.relpath(handler.absolute(), self._source.directory),
            manifest=None,
            batch_size=self._functions[key]["batch_size"],
            functions={key: self._functions[key]},
        )

    def _model_spec(self, node: Node) -> ModelSpec:
        directory = self._open(node)
        said = RegisterArguments(directory.url, directory.manifest.model_name, batch_size=node.numbers.batch_size)
        try:
            spec = self._preparer.prepare(directory, said).spec
        except ServerError as error:
            raise RunError(f"{node.name}: {error.message}") from error
        if spec.ranks or spec.continuous_batching or spec.sequence_batching:
            raise RunError(f"{node.name}: a model of several processes, or of sequences, needs a server")
        return spec

    def _open(self, node: Node) -> ModelDirectory:
        """The node's model; of one that the server would have registered by itself, the archive of that name."""
        shared = node.options.model
        url = node.url
        if url is None and shared is not None:
            found = (self._model_store / f"{shared.name}.mar", self._model_store / shared.name)
            url = next((path.name for path in found if os.path.exists(path)), f"{shared.name}.mar")
        name = model_name(self._source.name, node.name) if shared is None else shared.name
        if url is None:
            raise RunError(f"{node.name} has no url: no model can be loaded")
        # What a URL leads to is fetched into the scratch directory, where nothing of it stays.
        store = self._scratch / "fetched" if "://" in url else self._model_store
        (self._scratch / "fetched").mkdir(exist_ok=True)
        try:
            return open_archive(url, store, self._scratch / "models", model_name=name)
        except ServerError as error:
            raise RunError(f"{node.name}: {error.message} (model store: {self._model_store})") from error


def _collect(chunks: dict[int, list[bytes]]) -> SendChunk:
    """What takes the chunks of streamed answers, by row."""

    def send(row: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
        chunks.setdefault(row, []).append(body)

    return send


@contextlib.contextmanager
def _modules_of(loaded: _Loaded) -> Iterator[None]:
    """Lets a handler that imports something find its own modules, and none of another node's."""
    before = list(sys.path)
    sys.modules.update(loaded.modules)
    sys.path[:] = loaded.path
    try:
        yield
    finally:
        sys.path[:] = before
        loaded.modules = _put_away(loaded.folder)


def _put_away(folder: str) -> dict[str, ModuleType]:
    """Takes the modules of a folder out of `sys.modules`."""
    inside = (folder + os.sep, os.path.realpath(folder) + os.sep)
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.startswith(inside):
            found[name] = sys.modules.pop(name)
    return found


def _gpu() -> int | None:
    """The first GPU, as a server's first worker would have it."""
    import torch

    return 0 if torch.cuda.is_available() else None
