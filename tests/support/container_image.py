"""What deploy/docker/Dockerfile says."""

from __future__ import annotations

import re
import shlex

from support.server import REPOSITORY

DOCKER = REPOSITORY / "deploy" / "docker"


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (DOCKER / name).read_text()))
    return [(word, rest) for line in text.splitlines() if line for word, _, rest in [line.partition(" ")]]


def image_variables() -> dict[str, str]:
    """What the image's ENV sets."""
    rows = [rest for word, rest in instructions("Dockerfile") if word == "ENV"]
    return dict(pair.split("=", 1) for row in rows for pair in shlex.split(row))  # type: ignore[misc]
