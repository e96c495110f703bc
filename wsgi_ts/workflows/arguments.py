"""The arguments of the call that registers a workflow; REST, the API description and the manager go by this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsgi_ts.errors import BadRequest
from wsgi_ts.models.arguments import MODEL_NAME
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.kinds import FLAG, INT32, TEXT
from wsgi_ts.settings.table import argument


@dataclass(frozen=True, slots=True)
class WorkflowArguments:
    """What a register call gave."""

    url: str | None = argument(TEXT, None, "Where the archive is: a file of the workflow store or an allowed URL.")
    workflow_name: str | None = argument(
        TEXT, None, "Name of the workflow; the archive's own by default.", pattern=MODEL_NAME
    )
    response_timeout: int = argument(INT32, 120, "Longest run of a node's handler, in seconds.", unset=120)
    startup_timeout: int = argument(INT32, 120, "Longest start of a node's worker, in seconds.", unset=120)
    s3_sse_kms: bool = argument(
        FLAG, False, "Whether the object is asked of S3 as one encrypted with a key of KMS.", unset=False
    )
    replace: bool = argument(
        FLAG, False, "Whether a registered workflow of that name is replaced, without a lost request.", unset=False
    )

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> WorkflowArguments:
        """The arguments of a call.

        Raises:
            BadRequest: one is unknown, or the URL is missing.
        """
        try:
            arguments = cls(**given)
        except TypeError as error:
            raise BadRequest(f"Wrong arguments: {error}") from error
        if arguments.url is None:
            raise BadRequest("Parameter url is required.")
        return arguments
