"""`wsgi-ts handler new`: the files of a handler that runs as it is, to be changed from there."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

#: The folders of `templates`.
KINDS = ("base", "plain")


def write_project(folder: Path, kind: str) -> list[Path]:
    """Writes a handler, its model-config.yaml, its test and a README with the commands; `kind` is one of KINDS.

    Returns:
        The files that were written.

    Raises:
        FileExistsError: a file of one of these names is there; nothing is written then.
        OSError: the folder cannot be made or written to.
    """
    templates = sorted((resources.files(__package__) / "templates" / kind).iterdir(), key=lambda file: file.name)
    targets = [folder / file.name.removesuffix(".template") for file in templates]
    there = [target for target in targets if target.exists()]
    if there:
        raise FileExistsError(f"{there[0]} exists: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file, target in zip(templates, targets, strict=True):
        target.write_bytes(file.read_bytes())
    return targets
