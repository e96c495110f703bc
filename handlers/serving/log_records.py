"""What a handler's log records tell of the requests that they were made for: `trace_id`, `span_id`, `request_ids`.

Every record of a model worker has these three, for whatever format the handler logs in (`%(trace_id)s`, a formatter of
JSON); empty where no trace is recorded. A handler's own `extra` of the same name counts instead. They are looked up
when a line is made, and so cost a batch without one nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, Final, NamedTuple


class TraceFields(NamedTuple):
    """What a log record tells of what runs.

    Attributes:
        trace_id, span_id: in hexadecimal digits, as OpenTelemetry names them; empty where there are none.
        request_ids: of the requests that run, separated by commas.
    """

    trace_id: str = ""
    span_id: str = ""
    request_ids: str = ""


NO_FIELDS: Final = TraceFields()


class Running:
    """What runs: one batch, or one request of an asynchronous handler; `find` is asked of it with the first line."""

    __slots__ = ("_fields", "_find")

    def __init__(self, find: Callable[[], TraceFields]) -> None:
        self._find = find
        self._fields: TraceFields | None = None

    @property
    def fields(self) -> TraceFields:
        """What its lines tell."""
        if self._fields is None:
            try:
                self._fields = self._find()
            except Exception:
                # A handler can have changed any module under it; that costs the line its ids, and not the line.
                self._fields = NO_FIELDS
        return self._fields


class Present:
    """What runs at present: in this process, whatever thread a line is made in; and in this task of an event loop.

    Attributes:
        batch: what this process runs; None for nothing.
        request: what this task, and those that it has started, run, where requests run side by side.
    """

    batch: ClassVar[Running | None] = None
    request: ClassVar[ContextVar[Running | None]] = ContextVar("wsgi_ts_request", default=None)


class HandlerRecord(logging.LogRecord):
    """A log record of a model worker.

    The fields come into it only when its text is made: what `extra` holds may have any name that is not there before.
    """

    __slots__ = ("_found",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        running = Present.request.get() or Present.batch
        self._found = NO_FIELDS if running is None else running.fields

    def getMessage(self) -> str:
        """The message; every formatter asks for it before it looks at the record's fields."""
        own = self.__dict__
        for name, value in zip(TraceFields._fields, self._found, strict=True):
            own.setdefault(name, value)
        return super().getMessage()


class TracedFormatter(logging.Formatter):
    """The bare message, and behind it the trace that it belongs to, if it is recorded."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line, without a traceback."""
        text = super().formatMessage(record)
        fields = record.__dict__
        # A metric's line is read by the server, to its end.
        if not fields.get("trace_id") or text.startswith("[METRICS]"):
            return text
        return f"{text} trace_id={fields['trace_id']} span_id={fields.get('span_id', '')}"


def configure_logging(*, shows_traces: bool = False) -> None:
    """Sends the handler's log records to stdout, the bare message a line, as TorchServe's workers do.

    With `shows_traces` lines made for requests whose trace is recorded end with its ids.
    """
    logging.setLogRecordFactory(HandlerRecord)
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    if shows_traces:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(TracedFormatter("%(message)s"))
