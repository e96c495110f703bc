"""Runs a model's handler: loads it once, then turns each batch of requests into as many answers.

Whatever a handler does in `predict` (raise, exit, recurse, return rubbish, set a broken header) ends as an
error answer: of the whole batch where TorchServe says so, else of the one request. The worker lives on.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from wsgi_ts.handlers.metrics.cache import SAMPLE_INTERVAL_S, MetricsCache
from wsgi_ts.handlers.metrics.errors import GeneralMetricsCacheError
from wsgi_ts.handlers.metrics.metric import MetricTypes, Sample
from wsgi_ts.handlers.serving import loader
from wsgi_ts.handlers.serving.context import Context, Group, KvCacheSink, SendChunk, StreamClosed
from wsgi_ts.handlers.serving.errors import BatchFailure, UnreadableRows
from wsgi_ts.handlers.serving.failures import batch_answer, fault_of, has_broken_gpu, load_error, ran_out_of_memory
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.results import (
    INVALID_OUTPUT,
    PREDICTION_FAILED,
    RESPONSE_TOO_LARGE,
    UNSUPPORTED_OUTPUT,
    WRONG_LENGTH,
    Answer,
    encode,
    error_answer,
    row_answer,
)
from wsgi_ts.handlers.serving.warm_up import warm_up
from wsgi_ts.messages import ModelSpec
from wsgi_ts.ts_path import shim_path

log = logging.getLogger(__name__)

MetricsSink = Callable[[list[Sample]], None]
Handle = Callable[[Any, Any], Any]

#: Name of the metric that successful batches record.
PREDICTION_METRIC = "PredictionTime"


def end_copies() -> None:
    """Has forks of this process end that a handler lets come back: two of them would answer the batch, and go on."""
    os.register_at_fork(after_in_child=Service.become_copy)


class Service:
    """A loaded handler and its context.

    Attributes:
        context: what the handler is given at every call.
        handler: the handler object; None where the handler is a function.
        must_restart: true once the CUDA context is broken for good, so that every later call would fail: the
            worker is to be replaced after this batch.
        raised: whether the handler, or what it returned, failed the whole of the last batch.
        fault: what that was, in one line; of no meaning where `raised` is false.
        has_failed: whether a row of the last batch, or all, was answered with an error of the server.
        called_at, returned_at: when the handler was called for the last batch, and had returned (monotonic seconds).
        out_of_memory: whether that was for lack of memory.
    """

    _is_copy = False

    def __init__(
        self,
        entry: loader.Entry,
        context: Context,
        *,
        max_response_bytes: int = 6553500,
        metrics_sink: MetricsSink | None = None,
    ) -> None:
        self.context = context
        self.must_restart = False
        self.raised = self.has_failed = self.out_of_memory = False
        self.fault = ""
        self.called_at = self.returned_at = 0.0
        self.handler = entry.instance
        self._handle = entry.handle
        self._max_response_bytes = max_response_bytes
        self._metrics_sink = metrics_sink
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._next_prediction_time = 0.0

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        gpu_id: int | None,
        send_chunk: SendChunk | None,
        metrics_sink: MetricsSink | None = None,
        group: Group | None = None,
        shape: Callable[[Handle], Handle] | None = None,
        kv_cache_sink: KvCacheSink | None = None,
    ) -> Service:
        """Imports the handler from the model's folder and initialises it.

        Puts the model's folder and the `ts` compatibility package at the head of `sys.path`.

        Args:
            spec: the model version.
            gpu_id: GPU to use, None for CPU.
            send_chunk: called for each chunk of a streamed answer.
            metrics_sink: called once per batch with the metrics recorded since the last call.
            group: this process's rank, where the model spans several processes.
            shape: makes of the handler's function the one that is called, where its results take another form.
            kv_cache_sink: told how full the handler's KV cache is, whenever the handler says so.

        Raises:
            LoadError: memory ran out, or the handler raised a RuntimeError.
            BaseException: anything else the handler raises, after its traceback went to stderr.
        """
        ahead = [spec.model_dir, shim_path()]
        sys.path[:] = ahead + [folder for folder in sys.path if folder not in ahead]
        context = _new_context(spec, gpu_id, send_chunk, group)
        context._kv_cache_sink = kv_cache_sink
        try:
            context.model_yaml_config = _read_model_config(spec)
            entry = loader.load_entry(spec.handler, spec.model_dir, spec.envelope)
            if hasattr(entry.instance, "_weights_only"):
                # A handler may load weights by BaseHandler's methods without calling its `initialize`.
                entry.instance._weights_only = spec.weights_only
            if shape is not None:
                entry = entry._replace(handle=shape(entry.handle))
            service = cls(entry, context, max_response_bytes=spec.max_response_bytes, metrics_sink=metrics_sink)
            service._settle(entry.initialize(context))
            service._end_copy()
        except BaseException as error:
            cls._end_copy()
            known = load_error(error)
            if known is None:
                raise
            raise known from error
        # The other ranks of a group are not there to take part, and an async handler has no batch to run.
        if group is None and not spec.async_communication:
            warm_up(service.context, service.predict, spec)
        service._hand_over_metrics()
        return service

    def predict(self, requests: list[Request]) -> list[Answer]:
        """Runs the handler on one batch.

        Returns:
            One answer per request, in order; never raises for what the handler did.
        """
        context = self.context
        if len(requests) == 1:  # so are all where batches are not wanted, and comprehensions cost as much as the rest
            (request,) = requests
            request_ids, headers, rows = {0: request.request_id}, [request.headers], [request.row]
        else:
            request_ids = {row: request.request_id for row, request in enumerate(requests)}
            headers, rows = [request.headers for request in requests], [request.row for request in requests]
        context._begin_batch(request_ids, headers)
        if isinstance(context.metrics, MetricsCache):
            context.metrics.set_request_ids(request_ids)
        began = self.called_at = time.monotonic()
        self.raised = self.has_failed = False
        try:
            results = self._handle(rows, context)
            if type(results) is not list:
                results = self._settle(results)
            self.returned_at = time.monotonic()
            answers = self._answers(context, results, requests)
            if began >= self._next_prediction_time:
                self._record_prediction_time(context, began)
        except UnreadableRows as unreadable:
            answers = self._predict_readable(requests, unreadable)
        except BaseException as error:
            self.raised = self.has_failed = True
            self.fault = fault_of(error)
            self.returned_at = time.monotonic()
            answers = [self._failed(error)] * len(requests)
        if self._is_copy:
            self._end_copy()
        if self._metrics_sink is not None:
            self._hand_over_metrics()
        return answers

    def _predict_readable(self, requests: list[Request], unreadable: UnreadableRows) -> list[Answer]:
        """Runs the handler on the rows that can be read; each of the others is answered with what is wrong with it."""
        context, errors = self.context, unreadable.errors
        self.returned_at = time.monotonic()
        answers = {row: self._failed(error) for row, error in errors.items()}
        rest = [row for row in range(len(requests)) if row not in errors]
        if rest:
            batch = context.request_ids, context._headers
            send_chunk = context.cl_socket
            if send_chunk is not None:
                context.cl_socket = lambda place, *chunk: send_chunk(rest[place], *chunk)
            try:
                answers.update(zip(rest, self.predict([requests[row] for row in rest]), strict=True))
            finally:
                context.cl_socket = send_chunk
            processors = context.request_processor
            context._begin_batch(*batch)
            for place, row in enumerate(rest):
                context.request_processor[row] = processors[place]
        return [answers[row] for row in range(len(requests))]

    def marks(self) -> tuple[float, float, float, float]:
        """When, for the last batch, the handler was called, its preprocess and inference had ended, and it returned.

        In monotonic seconds; the two in the middle are 0 where it has not passed through `BaseHandler.handle`.
        """
        stages: tuple[float, float, float, float] | None = getattr(self.handler, "_stages_at", None)
        if stages is None or stages[0] < self.called_at or self.raised:
            return self.called_at, 0.0, 0.0, self.returned_at
        return stages

    def _record_prediction_time(self, context: Context, began: float) -> None:
        """Records how long a batch took; of those that begin within SAMPLE_INTERVAL_S, the first one's."""
        self._next_prediction_time = began + SAMPLE_INTERVAL_S
        metrics = context.metrics
        if isinstance(metrics, MetricsCache):
            elapsed_ms = round((time.monotonic() - began) * 1000, 2)
            metrics.add_metric(PREDICTION_METRIC, elapsed_ms, "ms", metric_type=MetricTypes.GAUGE)

    async def answer(self, request: Request, send_chunk: SendChunk) -> Answer:
        """Runs an async handler on one request, with a context of its own, beside others that run at the same time.

        `send_chunk` is called for each chunk of its answer, if that is streamed.

        Returns:
            Its answer; never raises for what the handler did.
        """
        metrics = self.context.metrics
        if isinstance(metrics, MetricsCache):
            metrics = metrics.for_request(request.request_id)
        context = self.context._for_request(request.request_id, request.headers, send_chunk, metrics)
        began = time.monotonic()
        try:
            results = self._handle([request.row], context)
            if inspect.isawaitable(results):
                results = await results
            [answer] = self._answers(context, list(results) if isinstance(results, list) else results, [request])
            if began >= self._next_prediction_time:
                self._record_prediction_time(context, began)
        except (asyncio.CancelledError, StreamClosed):
            # As a rule its client has gone: nothing to log, and nobody who reads this.
            answer = error_answer(503, PREDICTION_FAILED)
        except BaseException as error:
            answer = self._failed(error)
        self._end_copy()
        if self._metrics_sink is not None:
            self._hand_over_metrics()
        return answer

    @classmethod
    def become_copy(cls) -> None:
        """Tells a process that it is a fork which a handler has made (see `end_copies`)."""
        cls._is_copy = True

    @classmethod
    def _end_copy(cls) -> None:
        if cls._is_copy:
            text = "A process that the handler has forked came back from it, and ends here: end it with os._exit().\n"
            os.write(2, text.encode())
            os._exit(1)

    @property
    def event_loop(self) -> asyncio.AbstractEventLoop:
        """The loop on which an async handler runs, from its initialisation on; made when first asked for."""
        if self._event_loop is None:
            self._event_loop = asyncio.new_event_loop()
        return self._event_loop

    def close(self) -> None:
        """Gives back what serving took: the event loop of an async handler. The last call."""
        if self._event_loop is not None:
            self._event_loop.close()
            self._event_loop = None

    def _settle(self, results: Any) -> Any:
        """Awaits the coroutine of an async handler; a list subclass becomes a list; all else stays."""
        if inspect.iscoroutine(results):
            results = self.event_loop.run_until_complete(results)
        return list(results) if isinstance(results, list) else results

    def _answers(self, context: Context, results: Any, requests: list[Request]) -> list[Answer]:
        """Returns one answer per result.

        Raises:
            BatchFailure: not a list of that length, or an element that cannot be sent.
        """
        if type(results) is not list:
            raise BatchFailure(INVALID_OUTPUT, f"the handler returned a {type(results).__name__}, not a list")
        if len(results) != len(requests):
            raise BatchFailure(WRONG_LENGTH, f"the handler returned {len(results)} results for {len(requests)} rows")
        if context.stopping_criteria and not any(request.is_describe for request in requests):
            context._mark_streams(results)
        processors = context._processors
        limit = self._max_response_bytes
        answers = []
        for row, result in enumerate(results):
            kind = type(result)
            body = result if kind is bytes or kind is bytearray else encode(result)
            if body is None:
                self.has_failed = True
                answers.append(error_answer(503, UNSUPPORTED_OUTPUT))
            elif len(body) > limit:
                self.has_failed = True
                answers.append(error_answer(500, RESPONSE_TOO_LARGE))
            elif processors is None:
                answers.append(Answer(200, "", [], body))
            else:
                answers.append(row_answer(processors[row], body))
        return answers

    def _failed(self, error: BaseException) -> Answer:
        """Returns the answer of each request of a failed batch."""
        answer = batch_answer(error, self.context.model_name)
        self.must_restart = self.must_restart or has_broken_gpu(error)
        self.out_of_memory = ran_out_of_memory(error)
        return answer

    def _hand_over_metrics(self) -> None:
        metrics = self.context.metrics
        if isinstance(metrics, MetricsCache) and metrics.store:
            samples = metrics.take_samples()
            if self._metrics_sink is not None:
                self._metrics_sink(samples)


def _new_context(spec: ModelSpec, gpu_id: int | None, send_chunk: SendChunk | None, group: Group | None) -> Context:
    """Returns a model's context; a metrics.yaml that is broken, which the server has told of, makes no metrics."""
    metrics = MetricsCache(spec.metrics_config, spec.title)
    # Loading counts as a request, so that what `initialize` records has the dimensions ModelName and Level=Model.
    metrics.set_request_ids(str(uuid.uuid4()))
    if spec.metrics_config is not None:
        try:
            metrics.initialize_cache()
        except GeneralMetricsCacheError as error:
            log.warning("No metrics are known from metrics_config: %s", error)
    context = Context(
        model_name=spec.title,
        model_dir=spec.model_dir,
        manifest=spec.manifest,
        batch_size=spec.batch_size,
        gpu=gpu_id,
        limit_max_image_pixels=spec.limit_max_image_pixels,
        metrics=metrics,
    )
    context.cl_socket = send_chunk
    context._weights_only = spec.weights_only
    if group is not None:
        context.group = group
    return context


def _read_model_config(spec: ModelSpec) -> dict[str, Any]:
    """Returns the model's YAML file, {} where it has none or the file is empty."""
    if not spec.config_file:
        return {}
    path = Path(spec.model_dir) / spec.config_file
    with path.open(encoding="utf-8") as file:
        config = yaml.safe_load(file)
    return config if isinstance(config, dict) else {}
