"""What an instance writes down of itself in its run directory, and how others know it again by that."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any

from wsgi_ts.process import ProcessIdentity, boot_id
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.run_files import RunFiles

_PREFIX = re.compile(r"wsgi-ts-[0-9a-f]{32}")


class RecordError(ValueError):
    """A record is there and cannot be read; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Record:
    """The record of an instance; parts of it that make no sense are left out.

    Attributes:
        owner: the process that a user starts and stops.
        boot: see `boot_id`.
        prefix: the start of its shared-memory names.
        children: its other processes.
        host: the process that it is an engine of, which maps its memory and is not part of it; None: there is none.
    """

    owner: ProcessIdentity | None
    boot: str
    prefix: str | None
    children: tuple[ProcessIdentity, ...]
    host: ProcessIdentity | None = None

    @classmethod
    def read(cls, run_dir: str | os.PathLike[str]) -> Record | None:
        """The record in a run directory, None where there is none; raises RecordError where it cannot be read."""
        path = RunFiles(run_dir).record
        try:
            fields = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} cannot be read ({error})") from error
        if not isinstance(fields, dict):
            return None
        prefix, children = fields.get("prefix"), fields.get("children")
        found = [_identity(child) for child in children] if isinstance(children, list) else []
        return cls(
            owner=_identity({"start_time": -1, **fields}),
            boot=str(fields.get("boot_id")),
            prefix=prefix if isinstance(prefix, str) and _PREFIX.fullmatch(prefix) else None,
            # Nobody's child is the first process of all.
            children=tuple(identity for identity in found if identity is not None and identity.pid > 1),
            host=_identity(fields.get("host")),
        )

    @classmethod
    def find(cls, run_dir: str | os.PathLike[str]) -> Record | None:
        """As `read`; None, too, where it cannot be read."""
        try:
            return cls.read(run_dir)
        except RecordError:
            return None

    @property
    def pid(self) -> int | None:
        """The owner's pid, which proves nothing yet."""
        return self.owner.pid if self.owner is not None else None

    @property
    def is_running(self) -> bool:
        """Whether the very process that is named as the owner runs."""
        return self.owner is not None and self.boot == boot_id() and self.owner.is_alive()


def record_of(
    owner: ProcessIdentity, prefix: str, children: Iterable[tuple[ProcessIdentity, str]], host: ProcessIdentity | None
) -> dict[str, Any]:
    """Returns the fields of a record; `children` are its other processes, and what each is for people."""
    return {
        "pid": owner.pid,
        "start_time": owner.start_time,
        "boot_id": boot_id(),
        "prefix": prefix,
        "children": [
            {"pid": identity.pid, "start_time": identity.start_time, "role": role} for identity, role in children
        ],
        "host": None if host is None else {"pid": host.pid, "start_time": host.start_time},
    }


def _identity(fields: Any) -> ProcessIdentity | None:
    if not isinstance(fields, dict):
        return None
    pid, started = fields.get("pid"), fields.get("start_time")
    if isinstance(pid, int) and isinstance(started, int) and pid > 0:
        return ProcessIdentity(pid, started)
    return None
