"""Every kept input of the fuzz targets, run once: what was found stays mended. `make fuzz` looks for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import CORPUS, names
from fuzz.targets import TARGETS


def test_every_target_has_a_corpus() -> None:
    assert names() == sorted(TARGETS)


@pytest.mark.parametrize("name", names())
def test_kept_inputs_break_no_promise(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except BaseException as error:
            raise AssertionError(f"{_shown(path)}: {error!r}") from error


def _shown(path: Path) -> str:
    return f"{path.relative_to(CORPUS)} ({path.stat().st_size} bytes)"
