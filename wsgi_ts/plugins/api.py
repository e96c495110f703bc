"""What a plugin is written against: decorators, the objects it is given, and the methods of each group.

A plugin is an object in a Python module: a function, a class, or an app. Which group it belongs to is said by the
entry point that names it, or by a decorator of this module. Each process imports the plugins that it needs, once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

#: What `from wsgi_ts.plugins import …` knows.
__all__ = [
    "API",
    "Auth",
    "BatchHead",
    "BatchingPolicy",
    "Context",
    "EndpointError",
    "Fetcher",
    "Head",
    "ModelState",
    "ModelView",
    "Prediction",
    "Principal",
    "QueueState",
    "Refuse",
    "Sample",
    "Sink",
    "SnapshotStore",
    "Veto",
    "WorkerView",
    "endpoint",
    "plugin",
]

#: The version of everything in this module. A module written for another one says so: `WSGI_TS_API = 2`.
API = 1
API_NAME = "WSGI_TS_API"
#: Groups of entry points are `wsgi_ts.` and one of these.
GROUPS = ("endpoints", "auth", "batching", "snapshot", "events", "fetch", "metrics", "middleware")
#: What opens something to the network, or stands in the way of everybody: loaded only where the configuration names it.
NAMED_ONLY = frozenset({"endpoints", "auth", "middleware"})
ENDPOINT_TYPES = ("inference", "management", "metrics")
ENDPOINT_TIMEOUT_S = 60.0
_MARK = "__wsgi_ts_plugin__"

Plugin = TypeVar("Plugin")


@dataclass(frozen=True, slots=True)
class Mark:
    """What a decorator says of a plugin.

    Attributes:
        group: one of GROUPS.
        path: of an endpoint: the first segment of its paths.
        type: of an endpoint: the API that it is served with, one of ENDPOINT_TYPES.
        timeout_s: of an endpoint: how long it may take for an answer.
    """

    group: str
    name: str
    path: str = ""
    type: str = "inference"
    timeout_s: float = ENDPOINT_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Marked:
    """Stands for an object that takes no attributes, such as a Falcon app, together with its mark."""

    plugin: Any
    mark: Mark


def endpoint(
    path: str, *, type: str = "inference", name: str | None = None, timeout: float = ENDPOINT_TIMEOUT_S
) -> Callable[[Any], Any]:
    """Makes an endpoint of a function, a class, a Falcon resource or a WSGI app.

    Args:
        path: the first segment of its paths: `model-ready` answers `/model-ready` and all below it. A path of the
            server's own is replaced.
        type: the API: `inference`, `management` or `metrics`.
        name: the plugin's name; default: the path.
        timeout: seconds for an answer; then the client gets 503.

    Raises:
        ValueError: a path of more than one segment, or an unknown type.
    """
    segment = path.strip("/")
    if not segment or "/" in segment:
        raise ValueError(f"endpoint {path!r}: one path segment is wanted, such as 'model-ready'")
    if type not in ENDPOINT_TYPES:
        raise ValueError(f"endpoint {path!r}: type {type!r} is none of {', '.join(ENDPOINT_TYPES)}")
    return lambda plugin: _marked(plugin, Mark("endpoints", name or segment, segment, type, timeout))


def plugin(group: str, *, name: str | None = None) -> Callable[[Plugin], Plugin]:
    """Says which group a class or function belongs to.

    Args:
        group: one of GROUPS.
        name: the plugin's name; default: that of the class or function.

    Raises:
        ValueError: there is no such group.
    """
    if group not in GROUPS:
        raise ValueError(f"plugin group {group!r} is none of {', '.join(GROUPS)}")

    def mark(plugin: Plugin) -> Plugin:
        named: Plugin = _marked(plugin, Mark(group, name or str(getattr(plugin, "__name__", group))))
        return named

    return mark


def mark_of(plugin: Any) -> Mark | None:
    """What a decorator has said of an object; None for one that was not decorated itself."""
    if isinstance(plugin, Marked):
        return plugin.mark
    # Not getattr: a subclass or an instance of a plugin is none.
    mark = getattr(plugin, "__dict__", {}).get(_MARK)
    return mark if isinstance(mark, Mark) else None


def _marked(plugin: Any, mark: Mark) -> Any:
    try:
        setattr(plugin, _MARK, mark)
    except (AttributeError, TypeError):
        return Marked(plugin, mark)
    return plugin


class EndpointError(Exception):
    """An endpoint cannot answer: the client gets the message, and the status (500 by default)."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Veto(Exception):
    """Raised by `model_registering`: the model is not registered, and the client is told why (status 403)."""


# What an endpoint is given


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A model worker: whether it takes requests, and how much memory it has, in bytes."""

    is_running: bool
    memory: int


@dataclass(frozen=True, slots=True)
class ModelView:
    """The default version of a model, read only."""

    name: str
    version: str
    url: str
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a client would have been answered: status, headers of the handler, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Context(Protocol):
    """The server, as an endpoint sees it."""

    @property
    def config(self) -> Mapping[str, str]:
        """The settings that are given, as the text in config.properties."""

    @property
    def models(self) -> Mapping[str, ModelView]:
        """The registered models by name, as they are now."""

    def predict(
        self,
        name: str,
        data: bytes,
        timeout: float | None = None,
        *,
        version: str | None = None,
        content_type: str = "",
    ) -> Prediction:
        """Runs a model.

        Args:
            name: the model.
            data: the request's body.
            timeout: seconds for the answer; None for as long as the model may take.
            version: one of its versions; None for the default one.
            content_type: of the body.
        """


# What the other groups are asked


@dataclass(frozen=True, slots=True)
class Head:
    """A request before its body is read.

    Attributes:
        method, path, query: of the request line; of gRPC `POST` and `/package.Service/Method`.
        headers: by name in lower case.
        peer: the client's address, without its port.
        certificate: what the client has shown, verified by `client_ca_file`, as `ssl.SSLSocket.getpeercert` tells it;
            None where it has shown none.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    peer: str
    certificate: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a name for the log, and what `authorize` wants to know of them."""

    name: str
    claims: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Refuse:
    """A request is not let in: the status and the text of the answer."""

    status: int = 401
    text: str = "Authentication failed."


class Auth(Protocol):
    """Group `auth`: who may do what. Both are asked before the body is read.

    What they may depend on is the peer's address, its certificate, and the values of the headers named in `headers`: an
    answer is remembered for them, for `cache_s` seconds. The actions in `open_actions` are everybody's. An answer may
    take `timeout_s`; then the request gets 503. These four may be left out.
    """

    headers: Sequence[str] = ("authorization",)
    cache_s: float = 1.0
    open_actions: Sequence[str] = ()
    timeout_s: float = 5.0

    def authenticate(self, head: Head) -> Principal | Refuse | None:
        """Who asks; None where this plugin cannot say: the next one is asked, and after the last the answer is 401."""

    def authorize(self, principal: Principal, action: str, model: str) -> bool:
        """Whether they may do it.

        Args:
            principal: what `authenticate` has returned.
            action: predict, explain, describe, register, scale, unregister, metrics, ping, or other.
            model: the model's name; empty where the request names none before its body.
        """


@dataclass(frozen=True, slots=True)
class BatchHead:
    """What a batching policy may know of a waiting request: never its body."""

    headers: Mapping[str, str]
    body_bytes: int
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class QueueState:
    """The requests that would go together next: how many, their summed cost, and how long the oldest has waited."""

    waiting: int
    cost: float
    oldest_s: float
    queued: int


@dataclass(frozen=True, slots=True)
class ModelState:
    """The model: what a batch holds at most, its maxBatchDelay, how long its batches take (smoothed); times in s."""

    batch_size: int
    max_delay_s: float
    service_s: float


class BatchingPolicy(Protocol):
    """Group `batching`: which requests go together. Any method may be left out.

    All of them are quick (50 µs) and depend on their arguments only.
    """

    def key(self, head: BatchHead) -> Hashable:
        """Requests with unlike keys never share a batch."""

    def cost(self, head: BatchHead) -> float:
        """What a request adds to its batch, in a unit of the policy's own."""

    def admit(self, batch_cost: float, batch_n: int, cost: float) -> bool:
        """Whether a request of this cost may join a batch of `batch_n` requests; not asked for the first one."""

    def wait(self, queue: QueueState, model: ModelState) -> float:
        """Seconds that a batch which is not full should still wait for more; 0: it goes now."""


class SnapshotStore(Protocol):
    """Group `snapshot`: where snapshots are kept, in place of files."""

    def save(self, name: str, properties: Mapping[str, str]) -> None:
        """Keeps a snapshot under its name; `properties` are lines of a config.properties."""

    def last(self) -> Mapping[str, str] | None:
        """The newest one."""


class Fetcher(Protocol):
    """Group `fetch`: archives from URLs of another scheme. Runs in a process of its own for each archive."""

    scheme: str

    def open(self, url: str, dest: str) -> None:
        """Writes what the URL names into the file `dest`."""

    def verify(self, path: str, url: str) -> None:
        """Raises an exception where an archive is not to be used; may be left out. Asked for every fetched archive."""


class Sink(Protocol):
    """Group `metrics`: gets the metrics now and then."""

    interval_s: float = 10.0

    def emit(self, samples: Sequence[Sample]) -> None:
        """Passes the values on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One value: a counter's total, a gauge, or of a histogram its `_count` and `_sum`."""

    name: str
    kind: str
    labels: Mapping[str, str]
    value: float
