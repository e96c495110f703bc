"""A model in this process, without a server: opened, loaded and called as a model worker would do it."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsgi_ts.archive.manifest import parse_manifest
from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.errors import ServerError
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.inputs import LazyHeaders, Request, build_row
from wsgi_ts.handlers.serving.recording import RecordedRequest
from wsgi_ts.handlers.serving.results import Answer
from wsgi_ts.handlers.serving.service import Service
from wsgi_ts.messages import ModelSpec
from wsgi_ts.models.arguments import RegisterArguments
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.preparation import ModelPreparer
from wsgi_ts.models.registry import Registry
from wsgi_ts.settings.config import Config

#: The calls of a BaseHandler whose times are told apart.
STAGES = ("preprocess", "inference", "postprocess")
#: The name that a folder's model-config.yaml has by custom.
CONFIG_FILE = "model-config.yaml"


@dataclass(frozen=True, slots=True)
class Source:
    """What to open.

    Attributes:
        path: a model archive, a model's folder, or a handler's file.
        serialized_file: weights beside a handler's file.
        model_file: the architecture beside it.
        config_file: its model-config.yaml; by default the one that lies there.
    """

    path: Path
    serialized_file: str | None = None
    model_file: str | None = None
    config_file: str | None = None


@dataclass(slots=True)
class BatchRun:
    """One call of a handler.

    Attributes:
        answers: one for each request.
        chunks: what was streamed before each answer.
        seconds: how long the call took.
        stages: seconds spent in each of STAGES, where the handler has them.
    """

    answers: list[Answer]
    chunks: list[bytes]
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)

    def body(self, row: int) -> bytes:
        """The whole body of a request's answer."""
        return self.chunks[row] + bytes(self.answers[row].body)


def prepare(source: Source, work_dir: Path) -> ModelSpec:
    """Opens a model and decides what holds for it, as a server with default settings would.

    An archive is unpacked in `work_dir`.

    Raises:
        ServerError: it cannot be opened; the text says why.
    """
    path = source.path.resolve()
    config = Config(model_store=path.parent)
    preparer = ModelPreparer(config, Registry(Numbers(0)), work_dir, 0, in_process=True)
    if path.is_file() and path.suffix == ".py":
        directory = _directory_of(path, source)
    else:
        directory = preparer.open(RegisterArguments(str(path)), at_startup=True)
    spec = preparer.prepare(directory, None).spec
    if not spec.handler:
        raise ServerError(f"{source.path}: no handler is named in MAR-INF/MANIFEST.json")
    return spec


def _directory_of(handler: Path, source: Source) -> ModelDirectory:
    """The folder of a handler's file as a model's, with a manifest that names what the caller named."""
    config_file = source.config_file
    if config_file is None and (handler.parent / CONFIG_FILE).is_file():
        config_file = CONFIG_FILE
    files = {"serializedFile": source.serialized_file, "modelFile": source.model_file, "configFile": config_file}
    for name, file in files.items():
        if file is not None and not (handler.parent / file).is_file():
            raise ServerError(f"{handler.parent / file}: there is no such file ({name})")
    named = {name: file for name, file in files.items() if file is not None}
    manifest = parse_manifest(
        {"model": {"modelName": handler.stem, "modelVersion": "1.0", "handler": handler.name, **named}}
    )
    return ModelDirectory(handler.parent, manifest, str(handler), extracted=False)


class LocalModel:
    """A loaded handler in this process, on a GPU or (None) the CPU.

    Raises:
        LoadError: whatever the handler raised, after its traceback went to stderr.
    """

    def __init__(self, spec: ModelSpec, gpu_id: int | None = None) -> None:
        self.spec = spec
        self._chunks: list[bytes] = []
        self._stages: dict[str, float] = {}
        try:
            # Metrics of a handler go nowhere.
            self._service = Service.load(spec, gpu_id, self._keep_chunk, lambda samples: None)
        except LoadError as error:
            raise LoadError(error.status, str(error.__cause__)) from error
        except Exception as error:
            raise LoadError(500, f"{type(error).__name__}: {error}") from error
        handler = self._service.handler
        for stage in STAGES:
            call = getattr(handler, stage, None)
            if handler is not None and callable(call):
                setattr(handler, stage, self._timed(stage, call))

    def close(self) -> None:
        """Ends what the handler's service keeps."""
        self._service.close()

    def run(self, requests: Sequence[RecordedRequest]) -> BatchRun:
        """Calls the handler with one batch.

        Raises:
            BadInput: a body is not what its content type says.
        """
        batch = [self._request(each) for each in requests]
        self._chunks = [b""] * len(batch)
        self._stages = {}
        began = time.perf_counter()
        if self.spec.async_communication:
            answers = [
                self._service.event_loop.run_until_complete(self._answer(row, batch)) for row in range(len(batch))
            ]
        else:
            answers = self._service.predict(batch)
        return BatchRun(answers, self._chunks, time.perf_counter() - began, self._stages)

    def predict(self, values: Sequence[Any]) -> list[Any]:
        """Calls the handler with one batch of values, as a test wants it.

        Args:
            values: one for each request: bytes go as they are, text as text/plain, everything else as JSON.

        Returns:
            What each request is answered: JSON read, everything else as bytes.

        Raises:
            AssertionError: a request was answered with an error; the text has status and body.
            BadInput: a body is not what its content type says.
        """
        run = self.run([_sample_of(value) for value in values])
        results = []
        for row, answer in enumerate(run.answers):
            body = run.body(row)
            if answer.error or answer.status >= 400:
                raise AssertionError(f"request {row}: {answer.status} {body.decode('utf-8', 'backslashreplace')}")
            try:
                results.append(json.loads(body))
            except ValueError:
                results.append(body)
        return results

    async def _answer(self, row: int, batch: Sequence[Request]) -> Answer:
        def keep(_: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
            self._keep_chunk(row, status, phrase, headers, body)

        return await self._service.answer(batch[row], keep)

    def _request(self, sample: RecordedRequest) -> Request:
        types: dict[str, str] = {}
        row = build_row(
            sample.content_type,
            memoryview(sample.body),
            decode=self.spec.decode_input_request,
            query=sample.query,
            types=types,
        )
        explain = sample.request.partition(" ")[2].startswith("/explanations/")
        extra = {"url_path": "", "explain": str(explain)}
        return Request(str(uuid.uuid4()), row, LazyHeaders(sample.head, extra, types))

    def _keep_chunk(self, row: int, status: int, phrase: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self._chunks[row] += body

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._stages[stage] = self._stages.get(stage, 0.0) + time.perf_counter() - began

        return timed


def _sample_of(value: Any) -> RecordedRequest:
    if isinstance(value, (bytes, bytearray)):
        return RecordedRequest(body=bytes(value))
    if isinstance(value, str):
        return RecordedRequest(headers={"Content-Type": "text/plain"}, body=value.encode("utf-8"))
    return RecordedRequest(headers={"Content-Type": "application/json"}, body=json.dumps(value).encode("utf-8"))


@contextlib.contextmanager
def opened(source: Source, gpu_id: int | None = None, batch_size: int | None = None) -> Iterator[LocalModel]:
    """Opens and loads a model on a GPU or (None) the CPU, and removes afterwards what was unpacked.

    `batch_size` is told the handler in place of the model-config.yaml's.

    Raises:
        ServerError: it cannot be opened.
        LoadError: the handler could not be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="wsgi-ts-handler-", ignore_cleanup_errors=True) as work_dir:
        spec = prepare(source, Path(work_dir))
        if batch_size is not None:
            spec = replace(spec, batch_size=batch_size)
        with contextlib.closing(LocalModel(spec, gpu_id)) as model:
            yield model
