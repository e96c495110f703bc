"""A workflow as it is given to the commands: a .war file, the directory of one that was unpacked, or a YAML file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsgi_ts.errors import ServerError
from wsgi_ts.workflows.war import workflow_from

_YAML_ENDINGS = (".yaml", ".yml")


class SourceError(Exception):
    """What was given cannot be read; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Source:
    """What there is of a workflow.

    Attributes:
        spec_name: the name of the specification's file.
        handler_file: the file with the functions, which may be missing; None where none is named.
        directory: where functions find the other files of the archive.
        is_archive: whether it was packed, or unpacked; else it is a YAML file by itself.
    """

    name: str
    spec_name: str
    spec_text: str
    handler_file: Path | None
    directory: Path
    is_archive: bool


@contextlib.contextmanager
def open_source(path: Path, handler: Path | None = None) -> Iterator[Source]:
    """Opens what was given; what had to be unpacked goes when the block is left. A YAML file comes with its `handler`.

    Raises:
        SourceError: it is not there, or is no workflow.
    """
    with contextlib.ExitStack() as stack:
        try:
            source = _opened(path, handler, stack)
        except ServerError as error:
            raise SourceError(f"{path}: {error.message}") from error
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
        yield source


def _opened(path: Path, handler: Path | None, stack: contextlib.ExitStack) -> Source:
    if path.suffix.lower() in _YAML_ENDINGS and not path.is_dir():
        text = path.read_bytes().decode("utf-8", "replace").removeprefix("\ufeff")
        return Source(path.stem, path.name, text, handler, (handler or path).absolute().parent, is_archive=False)
    if handler is not None:
        raise SourceError("--handler goes with a YAML file; an archive names its own")
    flow = stack.enter_context(workflow_from(path))
    return Source(flow.name, flow.spec_file.name, flow.spec_text(), flow.handler_file, flow.path, is_archive=True)
