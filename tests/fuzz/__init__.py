"""Fuzzing: targets, the corpus of inputs, and the command that runs atheris (`fuzz.run`)."""

from __future__ import annotations

from pathlib import Path

#: A folder for each target, named like it.
CORPUS = Path(__file__).parent / "corpus"


def names() -> list[str]:
    """The targets; without importing what they fuzz, which atheris has to see being imported."""
    return sorted(path.name for path in CORPUS.iterdir() if path.is_dir())
