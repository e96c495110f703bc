"""What lies in the model store and in the workflow store, by the names of files alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from wsgi_ts.settings.config import ConfigError

#: How the names of model archives end.
ARCHIVE_SUFFIXES = (".mar", ".model", ".tar.gz")


def startup_archives(model_store: Path) -> list[str]:
    """What `load_models=all` stands for: the archives and directories of the model store, by name."""
    return [
        name
        for name in sorted(names_in(model_store))
        if not name.startswith(".") and (name.endswith(ARCHIVE_SUFFIXES) or _holds_files(model_store / name))
    ]


def _holds_files(directory: Path) -> bool:
    """Whether it is a directory with something in it: a volume of its own has an empty one, lost+found."""
    if not directory.is_dir():
        return False
    try:
        return bool(os.listdir(directory))
    except OSError:  # its registration says why
        return True


def startup_workflows(workflow_store: Path) -> list[str]:
    """What `load_workflows=all` stands for: the archives of the workflow store, by name."""
    return [name for name in sorted(names_in(workflow_store)) if not name.startswith(".") and name.endswith(".war")]


def archive_stem(name: str) -> str:
    """The name of an archive, or of a directory, of the model store without what says of what kind it is."""
    return next((name.removesuffix(suffix) for suffix in ARCHIVE_SUFFIXES if name.endswith(suffix)), name)


def names_in(directory: Path) -> Iterable[str]:
    """The names in a folder, none where there is no such folder; raises ConfigError where it cannot be read."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error.strerror}; check its permissions") from None
