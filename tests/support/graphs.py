"""Graphs for the tests of workflows."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def graphs(draw: st.DrawFn, names: st.SearchStrategy[str], most: int = 8) -> dict[str, list[str]]:
    """An acyclic graph with one start node, its nodes in any order."""
    nodes = draw(st.lists(names, min_size=1, max_size=most, unique=True))
    successors: dict[str, list[str]] = {name: [] for name in nodes}
    for number, name in enumerate(nodes[1:], start=1):
        for parent in draw(st.sets(st.sampled_from(nodes[:number]), min_size=1)):
            successors[parent].append(name)
    order = draw(st.permutations(nodes))
    leafless = draw(st.booleans())
    return {name: successors[name] for name in order if successors[name] or not leafless or len(nodes) == 1}
