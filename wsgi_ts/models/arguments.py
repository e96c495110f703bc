"""The arguments of the calls that register and scale a model, one table each.

REST, gRPC, the API description and the manager go by these tables. They are light: web workers load them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsgi_ts.errors import BadRequest
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.kinds import FLAG, INT32, TEXT
from wsgi_ts.settings.model_entries import RUNTIMES, known_runtime
from wsgi_ts.settings.table import Setting, argument, settings_of

#: More workers of one version than this are a slip of the finger, not a wish.
MAX_WORKERS = 1024
MAX_BATCH_SIZE = 65536
#: What a list of models shows at most, and when the client names no limit.
MAX_PAGE = 100
#: What may be the name of a model, besides that it has at most 255 bytes.
MODEL_NAME = r"^[^/\\\x00-\x1f\x7f]+$"
_WANTED = {"string": "a text", "integer": "a whole number", "boolean": "true or false"}


@dataclass(frozen=True, slots=True)
class RegisterArguments:
    """What a register call gave; None where it gave nothing (negative sizes and times count as nothing)."""

    url: str | None = argument(TEXT, None, "Where the archive is: a file of the model store or an allowed URL.")
    model_name: str | None = argument(
        TEXT, None, "Name of the model; the archive's own by default.", pattern=MODEL_NAME
    )
    handler: str | None = argument(TEXT, None, "Handler to use instead of the archive's.")
    runtime: str | None = argument(TEXT, None, "Instead of the archive's.", enum=list(RUNTIMES))
    batch_size: int | None = argument(INT32, 1, "Most requests of one call.", maximum=MAX_BATCH_SIZE)
    max_batch_delay: int | None = argument(INT32, 100, "Longest wait for a batch to fill, in milliseconds.")
    response_timeout: int | None = argument(INT32, 120, "Longest run of the handler, in seconds.")
    startup_timeout: int | None = argument(INT32, 120, "Longest start of a worker, in seconds.")
    initial_workers: int | None = argument(INT32, 0, "Number of workers to start at once.", maximum=MAX_WORKERS)
    synchronous: bool = argument(FLAG, True, "Whether the answer waits for the workers.", unset=True)
    s3_sse_kms: bool = argument(
        FLAG, False, "Whether the object is asked of S3 as one encrypted with a key of KMS.", unset=False
    )

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> RegisterArguments:
        """The arguments of a call, where all of them can be meant.

        Raises:
            BadRequest: one is unknown, the URL is missing, the runtime is none of TorchServe's, or a number is absurdly
                large.
        """
        try:
            arguments = cls(**given)
        except TypeError as error:
            raise BadRequest(f"Wrong arguments: {error}") from error
        if arguments.url is None:
            raise BadRequest("Parameter url is required.")
        check_runtime(arguments.runtime)
        for name, row in settings_of(cls).items():
            most = row.limits.get("maximum")
            if most is not None and (getattr(arguments, name) or 0) > most:
                raise BadRequest(f"Parameter {name} must not be larger than {most}.")
        return arguments


#: What a load call of the open inference protocol may say: how a model is to be served, not where it comes from.
LOAD_PARAMETERS: Mapping[str, Setting] = {
    name: row
    for name, row in settings_of(RegisterArguments).items()
    if name not in ("url", "model_name", "synchronous", "s3_sse_kms")
}


@dataclass(frozen=True, slots=True)
class ScaleArguments:
    """What a scale call gave, besides the model's name."""

    min_worker: int = argument(INT32, 1, "Least number of workers.", unset=1, minimum=0, maximum=MAX_WORKERS)
    max_worker: int | None = argument(
        INT32, None, "Not less than min_worker, its default.", minimum=0, maximum=MAX_WORKERS
    )
    model_version: str | None = argument(TEXT, None, "The version, where the path names none.")
    synchronous: bool = argument(FLAG, False, "Whether the answer waits for the workers.", unset=False)


def page_arguments(limit: int | None, first: int | None) -> dict[str, int]:
    """The arguments of the call that lists models; None: as many as there may be, from the beginning."""
    size = MAX_PAGE if limit is None or not 0 <= limit <= MAX_PAGE else limit
    return {"limit": size, "next_page_token": max(0, first or 0)}


def read_argument(name: str, row: Setting, value: Any) -> Any:
    """An argument in its type, None where it is not given; raises BadRequest for a value of another kind."""
    if value is None:
        return None
    try:
        return row.kind.parse(value)
    except ValueError as error:
        raise BadRequest(f"Parameter {name} must be {_WANTED[row.kind.json_type]}: {error}.") from None


def check_runtime(runtime: str | None) -> None:
    """Raises BadRequest for a runtime that is none of TorchServe's."""
    if runtime is not None and known_runtime(runtime) not in RUNTIMES:
        raise BadRequest(f"Invalid RuntimeType value: {runtime}")


def check_count(key: str, count: int) -> None:
    """Raises BadRequest for a number of workers that is negative or absurdly large."""
    if not 0 <= count <= MAX_WORKERS:
        raise BadRequest(f"Parameter {key} must be a number from 0 to {MAX_WORKERS}.")
