"""docs/security.md names the tests that hold what it says."""

from __future__ import annotations

import re

from support.server import REPOSITORY


def test_the_tests_that_the_page_names_are_there() -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[^`]+)`", page))
    assert len(named) > 20
    assert not [name for name in named if not (REPOSITORY / name).exists()]


def test_every_file_of_this_folder_is_named() -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text()
    tests = (path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "tests" / "abuse").glob("test_*.py"))
    assert not [name for name in tests if name not in page and not name.endswith("test_security_page.py")]
