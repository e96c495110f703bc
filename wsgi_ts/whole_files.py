"""Files that readers see whole: as they were, or as they are now."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, text: str, *, to_disk: bool = False) -> None:
    """Replaces a file in one step, mode 0600; where that fails, it stays as it was.

    In its folder nobody else may write files. With `to_disk` it outlasts the machine's crash from when this returns.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".new-{path.name}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            if to_disk:
                file.flush()
                os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if to_disk:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
