"""Answers about models that need no server."""

from __future__ import annotations

import pytest

from wsgi_ts.models.queries import in_hash_map_order


@pytest.mark.parametrize(
    ("registered", "listed"),
    [
        (["1.11", "1.2.1"], ["1.2.1", "1.11"]),
        (["2.0", "1.0"], ["1.0", "2.0"]),
        (["2.0", "1.1"], ["2.0", "1.1"]),
        (["1.1", "2.0"], ["1.1", "2.0"]),
        (["é", "𝄞", ""], ["", "𝄞", "é"]),
    ],
    ids=["newest first", "oldest last", "one place", "one place, the other way", "characters beyond ASCII"],
)
def test_versions_are_listed_in_the_order_of_a_java_hash_map(registered: list[str], listed: list[str]) -> None:
    assert in_hash_map_order(registered) == listed


def test_a_map_with_twelve_versions_has_more_places() -> None:
    versions = [f"{number}.{number}" for number in range(1, 13)]
    listed = "7.7 8.8 1.1 9.9 2.2 10.10 11.11 3.3 4.4 5.5 6.6"
    assert in_hash_map_order(versions[:-1]) == listed.split()
    listed = "7.7 8.8 9.9 10.10 11.11 12.12 1.1 2.2 3.3 4.4 5.5 6.6"
    assert in_hash_map_order(versions) == listed.split()
