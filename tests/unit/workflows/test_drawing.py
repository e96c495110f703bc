"""Graphs drawn with characters: who follows the lines finds the graph again."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.graphs import graphs

from wsgi_ts.workflows.drawing import draw, table
from wsgi_ts.workflows.layout import lay_out
from wsgi_ts.workflows.spec import WorkflowSpec, parse_spec


def spec_of(dag: dict[str, list[str]] | str) -> WorkflowSpec:
    return parse_spec(f"models: {{}}\ndag: {dag if isinstance(dag, str) else json.dumps(dag)}")


def test_a_chain() -> None:
    assert draw(spec_of("{pre: [m1], m1: [post]}")) == "pre ───▶ m1 ───▶ post"
    assert draw(spec_of("{pre: [m1], m1: [post]}"), ascii_only=True) == "pre ---> m1 ---> post"
    assert draw(spec_of("{alone: []}")) == "alone"


def test_branches_that_meet_again() -> None:
    drawn = draw(spec_of("{pre: [en_de, en_fr], en_de: [join], en_fr: [join]}"))
    assert drawn.splitlines() == [
        "      ┌──▶ en_de ──┐",
        "      │            ▼",
        "pre ──┴──▶ en_fr ──┴──▶ join",
    ]


def test_wide_letters_take_two_columns_and_marks_none() -> None:
    drawn = draw(spec_of("{入力: [en_de, 日本語], en_de: [é], 日本語: [é]}"))
    assert drawn.splitlines() == [
        "       ┌──▶ en_de ───┐",
        "       │             ▼",
        "入力 ──┴──▶ 日本語 ──┴──▶ é",
    ]
    rows = table(spec_of("{入力: [é, name]}")).splitlines()
    assert [row.partition("function")[0] for row in rows[1:]] == ["入力  ", "é     ", "name  "]


def test_a_node_of_two_parents_of_which_one_is_the_others() -> None:
    drawn = draw(spec_of("{pre: [cat_dog, breed], cat_dog: [breed]}"))
    assert drawn.splitlines() == [
        "      ┌──▶ cat_dog ──┐",
        "      │              ▼",
        "pre ──┴──────────────┴──▶ breed",
    ]


#: Where a line goes on from a character, by the direction in which it comes.
_TURNS = {
    ("right", "─"): ["right"],
    ("right", "│"): ["right"],
    ("right", "┐"): ["down"],
    ("right", "┘"): ["up"],
    ("right", "┤"): ["up", "down"],
    ("right", "┬"): ["right", "down"],
    ("right", "┴"): ["right", "up"],
    ("right", "┼"): ["right", "up", "down"],
    ("down", "│"): ["down"],
    ("down", "▼"): ["down"],
    ("down", "└"): ["right"],
    ("down", "┴"): ["right"],
    ("down", "├"): ["right", "down"],
    ("up", "│"): ["up"],
    ("up", "▲"): ["up"],
    ("up", "┌"): ["right"],
    ("up", "┬"): ["right"],
    ("up", "├"): ["right", "up"],
}
_STEPS = {"right": (0, 1), "down": (1, 0), "up": (-1, 0)}


def followed(drawn: str) -> dict[str, set[str]]:
    """The graph that a reader finds, who goes from left to right and never against an arrow."""
    lines = drawn.splitlines()
    letter = {(row, column): char for row, line in enumerate(lines) for column, char in enumerate(line)}
    places = {(row, match.start()): match[0] for row, line in enumerate(lines) for match in re.finditer(r"\w+", line)}
    found: dict[str, set[str]] = {}
    for (row, column), name in places.items():
        found[name] = set()
        ahead = [(row, column + len(name) + 1, "right")]
        while ahead:
            at_row, at_column, heading = ahead.pop()
            char = letter.get((at_row, at_column), " ")
            if heading == "right" and char == "▶":
                found[name].add(places[at_row, at_column + 2])
            elif char != " " or (at_row, at_column) != (row, column + len(name) + 1):
                for turn in _TURNS[heading, char]:
                    next_row, next_column = at_row + _STEPS[turn][0], at_column + _STEPS[turn][1]
                    against = {"up": "▼", "down": "▲"}.get(turn)
                    if letter[next_row, next_column] != against:
                        ahead.append((next_row, next_column, turn))
    return found


NAMES = st.sampled_from([f"n{number}" for number in range(9)] + ["a_long_name", "x", "another"])


@given(graphs(NAMES, 9))
@example({"s": ["a", "b"], "a": ["c", "d"], "b": ["c", "d"], "c": ["t"], "d": ["t"]})
@settings(deadline=None, max_examples=150)
def test_who_follows_the_lines_finds_the_graph(dag: dict[str, list[str]]) -> None:
    spec = spec_of(dag)
    drawn = draw(spec)
    assert followed(drawn) == {name: set(node.successors) for name, node in spec.nodes.items()}, f"\n{drawn}"
    assert not any(line.endswith(" ") for line in drawn.splitlines())
    assert draw(spec, ascii_only=True).isascii()


@given(graphs(NAMES, 9))
@settings(deadline=None, max_examples=80)
def test_a_layout_keeps_nodes_apart_and_edges_forward(dag: dict[str, list[str]]) -> None:
    spec = spec_of(dag)
    layout = lay_out(spec.order, {name: node.successors for name, node in spec.nodes.items()})
    assert sorted(name for layer in layout.layers for name in layer) == sorted(spec.nodes)
    for names in layout.layers:
        assert all(layout.row_of[below] - layout.row_of[above] > 0.999 for above, below in pairwise(names))
    for edge in layout.edges:
        assert len(edge.rows) == layout.layer_of[edge.child] - layout.layer_of[edge.parent] + 1 >= 2
        assert (edge.rows[0], edge.rows[-1]) == (layout.row_of[edge.parent], layout.row_of[edge.child])
    assert min(layout.row_of.values()) >= 0


def test_the_table_says_what_each_node_is() -> None:
    spec = parse_spec(
        "models:\n  m: {url: m.mar, max-workers: 2, batch-size: -1, max-batch-delay: -100}\n  n: {max-workers: -1}\n"
        "dag: {f: [m, n, s]}\n"
        "options: {nodes: {m: {when: is_dog, pass: [request]}, n: {optional: true}, s: {model: minilm/2.0}}}"
    )
    assert table(spec).splitlines() == [
        "node  what              workers  batch           delay           attempts  time-out  options",
        "f     function                   1                               2         10000 ms",
        "m     m.mar             2        of the archive  of the archive  2         10000 ms  when is_dog, gets the request",  # noqa: E501
        "n     no url            0        1               50 ms           2         10000 ms  optional",
        "s     model minilm/2.0                                           2         10000 ms",
    ]


@pytest.mark.parametrize("options", ["a: {scatter: true}\n    c: {gather: true}", "b: {on-error: default, default: 5}"])
def test_the_table_says_what_happens_to_items_and_errors(options: str) -> None:
    spec = parse_spec(f"models: {{}}\ndag: {{a: [b], b: [c]}}\noptions:\n  nodes:\n    {options}")
    assert re.search("scatter|on error default", table(spec))
