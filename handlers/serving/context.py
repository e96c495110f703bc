"""What a handler is told of its model and of its requests, and how it sets status and headers of an answer.

The public names of `Context` and `RequestProcessor` are those of TorchServe and no others; all else starts
with `_`. One `Context` lives as long as its model worker: a handler may keep things in it between batches.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from wsgi_ts import TORCHSERVE_VERSION

#: Header of an answer, or of a part of one: "true" where another part follows.
STREAM_NEXT = "ts_stream_next"

#: Sends one chunk of a streamed answer: (row, status, phrase, headers, body). Where requests are answered one by one on
#: an event loop it returns something to await: until then the chunk may wait in this process for a slow client.
SendChunk = Callable[[int, int, str, list[tuple[str, str]], bytes], Awaitable[None] | None]

#: Is told how full a handler's KV cache is, from 0 to 1.
KvCacheSink = Callable[[float], None]


class Group(Protocol):
    """The ranks of a model that spans several processes, as one of them sees it."""

    @property
    def rank(self) -> int:
        """Which of them this process is."""

    @property
    def ranks(self) -> int:
        """How many there are on this machine."""


class StreamClosed(ConnectionError):
    """Raised by a `SendChunk` whose client has gone: nobody reads this answer any more."""


class RequestProcessor:
    """Request headers, and the response status and headers, of one row of a batch."""

    def __init__(self, request_header: Mapping[str, Any]) -> None:
        self._status_code: Any = 200
        self._reason_phrase: Any = None
        self._response_header: dict[Any, Any] = {}
        self._request_header = request_header

    def get_request_property(self, key: str) -> Any:
        """Returns the request header of exactly this spelling, or None."""
        return self._request_header.get(key)

    def get_request_properties(self) -> dict[str, Any]:
        """Returns all request headers, as a dict."""
        headers = self._request_header
        if not isinstance(headers, dict):
            headers = _as_dict(headers)
            self._request_header = headers
        return headers

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        """Sets the answer's HTTP status and reason phrase."""
        self._status_code = code
        self._reason_phrase = reason_phrase

    def get_response_status_code(self) -> Any:
        """Returns the answer's HTTP status; 200 unless set."""
        return self._status_code

    def get_response_status_phrase(self) -> Any:
        """Returns the answer's reason phrase; None unless set."""
        return self._reason_phrase

    def add_response_property(self, key: str, value: str) -> None:
        """Sets a header of the answer."""
        self._response_header[key] = value

    def get_response_headers(self) -> dict[Any, Any]:
        """Returns the headers set so far."""
        return self._response_header

    def get_response_header(self, key: str) -> Any:
        """Returns one header set so far, or None."""
        return self._response_header.get(key)


class Context:
    """What a handler gets beside its data: model, device, configuration, headers, status, metrics.

    Args:
        model_dir: folder of the extracted archive.
        manifest: the archive's manifest, None where it has none.
        batch_size: the largest batch the handler will be given.
        gpu: index of the GPU to use, None for CPU.
        mms_version: the server version shown in `system_properties`.
        limit_max_image_pixels: whether Pillow's limit for huge images stays in force.
        model_yaml_config: content of the model's YAML configuration file.

    Attributes:
        group: this process's rank; there only where the model spans several processes.
    """

    group: Group

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: dict[str, Any] | None,
        batch_size: int | None,
        gpu: int | None,
        mms_version: str = TORCHSERVE_VERSION,
        limit_max_image_pixels: bool = True,
        metrics: Any = None,
        model_yaml_config: dict[str, Any] | None = None,
    ) -> None:
        self.model_name = model_name
        self.manifest = manifest
        self.model_yaml_config: dict[str, Any] = {} if model_yaml_config is None else model_yaml_config
        self.request_ids: dict[int, str] = {}
        self.cl_socket: SendChunk | None = None
        self.stopping_criteria: Any = None
        self.header_key_sequence_id = os.environ.get("TS_REQUEST_SEQUENCE_ID", "ts_request_sequence_id")
        self.header_key_sequence_start = os.environ.get("TS_REQUEST_SEQUENCE_START", "ts_request_sequence_start")
        self.header_key_sequence_end = os.environ.get("TS_REQUEST_SEQUENCE_END", "ts_request_sequence_end")
        self._system_properties: dict[str, Any] = {
            "model_dir": model_dir,
            "gpu_id": gpu,
            "batch_size": batch_size,
            "server_name": "MMS",
            "server_version": mms_version,
            "limit_max_image_pixels": limit_max_image_pixels,
        }
        self._metrics = metrics
        self._kv_cache_sink: KvCacheSink | None = None
        self._weights_only = True
        self._headers: Sequence[Mapping[str, Any]] = ()
        self._processors: list[RequestProcessor] | None = [RequestProcessor({})]
        self._closed: set[int] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # compared by value, as in TorchServe

    @property
    def system_properties(self) -> dict[str, Any]:
        """model_dir, gpu_id, batch_size, server_name, server_version and limit_max_image_pixels."""
        return self._system_properties

    @property
    def metrics(self) -> Any:
        """The handler's metrics."""
        return self._metrics

    @metrics.setter
    def metrics(self, metrics: Any) -> None:
        self._metrics = metrics

    @property
    def request_processor(self) -> list[RequestProcessor]:
        """One RequestProcessor per row of the batch."""
        if self._processors is None:
            self._processors = [RequestProcessor(headers) for headers in self._headers]
        return self._processors

    @request_processor.setter
    def request_processor(self, processors: list[RequestProcessor]) -> None:
        self._processors = processors

    def get_request_id(self, idx: int = 0) -> str | None:
        """Returns the id of the request in row `idx`, or None."""
        return self.request_ids.get(idx)

    def get_request_header(self, idx: int, key: str) -> Any:
        """The request header of exactly this spelling in row `idx`, or None."""
        return self.request_processor[idx].get_request_property(key)

    def get_all_request_header(self, idx: int) -> dict[str, Any]:
        """Returns all request headers of row `idx`."""
        return self.request_processor[idx].get_request_properties()

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Sets the answer's content type in row `idx`."""
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> Any:
        """Returns the content type set for row `idx`, or None."""
        return self.get_response_headers(idx).get("content-type")

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Sets HTTP status and reason phrase of row `idx`."""
        self.request_processor[idx].report_status(code, reason_phrase=phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        """Sets HTTP status and reason phrase of every row of the batch."""
        for processor in self.request_processor:
            processor.report_status(code, reason_phrase=phrase)

    def get_response_status(self, idx: int) -> tuple[Any, Any]:
        """HTTP status and reason phrase of row `idx`."""
        processor = self.request_processor[idx]
        return processor.get_response_status_code(), processor.get_response_status_phrase()

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Sets a header of the answer in row `idx`."""
        self.request_processor[idx].add_response_property(key, value)

    def get_response_headers(self, idx: int) -> dict[Any, Any]:
        """Returns the headers set for row `idx`."""
        return self.request_processor[idx].get_response_headers()

    def get_sequence_id(self, idx: int) -> str:
        """Returns the id of the sequence that the request in row `idx` belongs to, "" where it belongs to none."""
        return self.request_processor[idx].get_request_property(self.header_key_sequence_id) or ""

    def _mark_streams(self, results: list[Any]) -> None:
        """Says of each row, by `stopping_criteria`, whether its answer goes on: True ends it, None says nothing."""
        criteria = self.stopping_criteria
        for row, result in enumerate(results):
            ends = criteria[row](result)
            if ends is not None:
                self.set_response_header(row, STREAM_NEXT, "false" if ends else "true")

    def _for_request(
        self, request_id: str, headers: Mapping[str, Any], send_chunk: SendChunk | None, metrics: Any
    ) -> Context:
        """Returns a context for one request alone; what the handler has put into this one is shared, not copied."""
        own = copy.copy(self)
        own.cl_socket = send_chunk
        own._metrics = metrics
        own._closed = set()
        own._begin_batch({0: request_id}, [headers])
        return own

    def _begin_batch(self, request_ids: dict[int, str], headers: Sequence[Mapping[str, Any]]) -> None:
        """Points the context at a new batch. Processors are made when first asked for."""
        self.request_ids = request_ids
        self._headers = headers
        self._processors = None
        if self._closed:
            self._closed = set()


def _as_dict(headers: Mapping[str, Any]) -> dict[str, Any]:
    to_dict = getattr(headers, "to_dict", None)
    return to_dict() if to_dict is not None else dict(headers)
