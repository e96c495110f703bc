"""Spans on their way to a collector: OTLP over HTTP, from a thread that may wait, by OpenTelemetry's own variables.

OpenTelemetry's Python SDK would do this too, and takes 60 µs of CPU for each span: more than a prediction costs. Here
spans are made as the messages that are sent (`wsgi_ts.supervisor.spans`), and only sending them is left.
https://opentelemetry.io/docs/specs/otlp/ (OTLP/HTTP) and https://opentelemetry.io/docs/specs/otel/protocol/exporter/.
"""

from __future__ import annotations

import gzip
import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import requests
from opentelemetry.util.re import parse_env_headers

from wsgi_ts import __version__

log = logging.getLogger(__name__)

#: Where a collector takes spans, behind the URL that is given.
_TRACES_PATH: Final = "/v1/traces"
#: Answers after which the same spans are sent once more.
_AGAIN: Final = (429, 502, 503, 504)
#: How long the second try waits, in seconds, and each further one twice as long.
_FIRST_PAUSE_S: Final = 0.5
#: How often it is said that spans are lost, in seconds.
_SAID_EVERY_S: Final = 60.0
_COMPRESS: Final[Mapping[str, Callable[[bytes], bytes]]] = {"gzip": gzip.compress, "deflate": zlib.compress}


class SenderOptions(NamedTuple):
    """How spans are sent.

    Attributes:
        url: where to.
        headers: more than OTLP's own, such as a token.
        timeout_s: for one message, with all tries.
        compression: gzip, deflate, or none.
        verify: a file with certificates of authorities; True for those of the system.
        cert: files with this client's certificate and its key, or with both in one; None for none.
        every_s: how long spans are gathered at most.
        batch: how many spans are sent together.
        queue: how many spans may wait; what comes then is lost.
    """

    url: str
    headers: Mapping[str, str]
    timeout_s: float
    compression: str
    verify: str | bool
    cert: str | tuple[str, str] | None
    every_s: float
    batch: int
    queue: int

    @classmethod
    def of(cls, endpoint: str, environ: Mapping[str, str] = os.environ) -> SenderOptions:
        """Returns what OpenTelemetry's variables say; those for traces alone count before those for all.

        `endpoint` is the setting, a URL without the path, or with it.
        """

        def told(name: str) -> str:
            return environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""

        key, certificate = told("CLIENT_KEY"), told("CLIENT_CERTIFICATE")
        batch = max(1, int(_number(environ, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 8192)))
        return cls(
            url=traces_url(endpoint, environ),
            headers=parse_env_headers(told("HEADERS"), liberal=True),
            timeout_s=_positive(told("TIMEOUT"), 10.0),
            compression=told("COMPRESSION").strip().lower() or "none",
            verify=told("CERTIFICATE") or True,
            cert=((certificate, key) if key else certificate) if certificate else None,
            every_s=_number(environ, "OTEL_BSP_SCHEDULE_DELAY", 5000.0) / 1000,
            batch=batch,
            queue=max(batch, int(_number(environ, "OTEL_BSP_MAX_QUEUE_SIZE", 65536))),
        )


class SpanSender:
    """Sends messages one after the other, and says once a minute that a collector takes none."""

    def __init__(self, endpoint: str, options: SenderOptions) -> None:
        self._endpoint = endpoint
        self._options = options
        self._session = requests.Session()
        self._session.headers.update(
            {
                "User-Agent": f"wsgi-ts/{__version__}",
                **options.headers,
                "Content-Type": "application/x-protobuf",
                **({"Content-Encoding": options.compression} if options.compression in _COMPRESS else {}),
            }
        )
        self._waiting: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        self._waiting_spans = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._lost = 0
        self._say_at = 0.0
        #: That spans are lost, and not yet that they are taken again.
        self._has_said = False
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._thread.start()

    def send(self, message: bytes, spans: int) -> None:
        """Takes a message to send, with so many spans; where too many wait it is lost. One alone always fits."""
        with self._lock:
            fits = not self._waiting_spans or self._waiting_spans + spans <= self._options.queue
            if fits:
                self._waiting_spans += spans
        if fits:
            self._waiting.put((message, spans))
        else:
            self._note_lost(spans)

    def close(self, within_s: float) -> None:
        """Sends what is left, for so long at most."""
        self._waiting.put(None)
        self._thread.join(within_s)
        self._closing.set()

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            message, spans = waiting
            with self._lock:
                self._waiting_spans -= spans
            if not self._post(message):
                self._note_lost(spans)
            elif self._has_said:
                with self._lock:
                    lost, self._lost, self._has_said = self._lost, 0, False
                log.info("The collector at %s takes spans again; %d were lost", self._endpoint, lost)

    def _post(self, message: bytes) -> bool:
        """Sends a message, more than once where that may help; returns whether it was taken."""
        options = self._options
        data = _COMPRESS.get(options.compression, bytes)(message)
        until = time.monotonic() + options.timeout_s
        pause = _FIRST_PAUSE_S
        while (left := until - time.monotonic()) > 0:
            asked: float = 0.0
            try:
                answer = self._session.post(
                    options.url, data=data, timeout=left, verify=options.verify, cert=options.cert
                )
            except requests.RequestException as error:
                log.debug("%s: %s", options.url, error)
            except OSError as error:  # a file with certificates that is not there
                log.debug("%s: %s", options.url, error)
                return False
            else:
                if answer.ok:
                    return True
                if answer.status_code not in _AGAIN:
                    return False
                asked = _positive(answer.headers.get("retry-after", ""), 0.0)
            pause, now = max(pause, asked), time.monotonic()
            if now + pause >= until or self._closing.wait(pause):
                return False
            pause *= 2
        return False

    def _note_lost(self, spans: int) -> None:
        now = time.monotonic()
        with self._lock:
            self._lost += spans
            lost, must_say = self._lost, now >= self._say_at
            if must_say:
                self._say_at = now + _SAID_EVERY_S
                self._has_said = True
        if must_say:
            log.warning("The collector at %s does not take spans; %d are lost so far", self._endpoint, lost)


def traces_url(endpoint: str, environ: Mapping[str, str] = os.environ) -> str:
    """Returns where spans are sent: a URL that OpenTelemetry's variable gives for traces alone counts as it is."""
    if endpoint == environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or endpoint.endswith(_TRACES_PATH):
        return endpoint
    return endpoint.rstrip("/") + _TRACES_PATH


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    return _positive(environ.get(name, ""), default)


def _positive(text: str, default: float) -> float:
    """Returns what a text says, where it is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        return default
    return number if 0 < number < 1e9 else default
