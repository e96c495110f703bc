"""A workflow's graph drawn with characters, for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from wsgi_ts.workflows.layout import Layout, lay_out
from wsgi_ts.workflows.spec import Node, NodeKind, WorkflowSpec

#: What a cell of a line looks like, by the sides on which it goes on: 1 up, 2 down, 4 left, 8 right.
#: Then come the arrows to the right, down and up.
_UNICODE = " │││─┘┐┤─└┌├─┴┬┼▶▼▲"
_ASCII = " |||-+++-+++-+++>v^"
_UP, _DOWN, _LEFT, _RIGHT = 1, 2, 4, 8
_HEAD = 16

#: Line and column.
_Cell = tuple[int, int]
#: The lines where an edge begins and ends in a channel.
_Edge = tuple[int, int]


#: The line of the drawing for a layer and a row.
_LineOf = Callable[[int, float], int]


class _Lane(NamedTuple):
    """An upright line of a channel: the line from which edges come, and those to which they go."""

    start: int
    ends: tuple[int, ...]

    def scaled(self, scale: int) -> _Lane:
        """The same where lines are further apart."""
        return _Lane(scale * self.start, tuple(scale * end for end in self.ends))


def draw(spec: WorkflowSpec, *, ascii_only: bool = False) -> str:
    """The graph from left to right, each line without blanks at its end; no newline at the end.

    `ascii_only` is for terminals that show nothing else.
    """
    layout = lay_out(spec.order, {name: node.successors for name, node in spec.nodes.items()}, whole_rows=True)
    plain = [_lanes(hops) for hops in _channels(layout, _same_row)]
    ordered = [_in_order(lanes) for lanes in plain]
    if any(lanes is None for lanes in ordered):
        # Two edges change places: with every other layer lower, none arrives in a line that another leaves.
        canvas = _Canvas(layout, _every_other_lower, [_lanes(hops) for hops in _channels(layout, _every_other_lower)])
    else:
        is_merging = any(len({end for _, end in hops}) < len(hops) for hops in _channels(layout, _same_row))
        scale = 2 if is_merging else 1
        lanes = [[lane.scaled(scale) for lane in lanes or []] for lanes in ordered]
        canvas = _Canvas(layout, lambda layer, row: scale * int(row), lanes)
    return canvas.text(_ASCII if ascii_only else _UNICODE)


def table(spec: WorkflowSpec) -> str:
    """What each node is, one line for each, with a head."""
    head = ("node", "what", "workers", "batch", "delay", "attempts", "time-out", "options")
    rows = [head, *(_row(spec.nodes[name]) for name in spec.order)]
    widths = [max(len(columns_of(row[column])) for row in rows) for column in range(len(head))]
    lines = (
        "  ".join(
            cell + " " * (width - len(columns_of(cell))) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def columns_of(text: str) -> list[str]:
    """A text as a terminal shows it, by columns: a wide letter has two, the second "", and a mark none of its own."""
    columns: list[str] = []
    for letter in text:
        if unicodedata.category(letter) in ("Mn", "Me", "Cf") and columns:
            columns[-1] += letter
        else:
            columns += [letter, ""] if unicodedata.east_asian_width(letter) in "WF" else [letter]
    return columns


def describe_options(node: Node) -> list[str]:
    """What `options` says of a node, each in a few words."""
    options = node.options
    said = [
        f"when {options.when}" if options.when else "",
        "optional" if options.optional else "",
        f"on error {options.on_error}" if options.on_error != "fail" and not options.optional else "",
        "scatter" if options.scatter else "",
        "gather" if options.gather else "",
        "gets the request" if options.pass_request else "",
    ]
    return [text for text in said if text]


def _row(node: Node) -> tuple[str, ...]:
    numbers, shared = node.numbers, node.options.model
    delay = "of the archive" if numbers.max_batch_delay_ms == -100 else f"{numbers.max_batch_delay_ms} ms"
    what, workers, batch = "function", "", str(numbers.batch_size)
    if shared is not None:
        what, batch, delay = f"model {shared.name}{f'/{shared.version}' if shared.version else ''}", "", ""
    elif node.kind is NodeKind.MODEL:
        what, workers = node.url or "no url", str(max(0, numbers.max_workers))
        batch = "of the archive" if numbers.batch_size == -1 else batch
    else:
        delay = ""
    attempts, limit = str(1 + numbers.retry_attempts), f"{numbers.timeout_ms} ms"
    return node.name, what, workers, batch, delay, attempts, limit, ", ".join(describe_options(node))


class _Canvas:
    """Columns of names, and between two of them a channel in which the edges go up and down.

    Lines are read from left to right. Where two cross they are not joined, and the upright one is drawn over the other;
    where one joins another, it has an arrow.

    Args:
        layout: the graph, with whole rows.
        line_of: the line of the drawing for a layer and a row.
        lanes: those of each channel, from left to right.
    """

    def __init__(self, layout: Layout, line_of: _LineOf, lanes: list[list[_Lane]]) -> None:
        self._layout = layout
        self._line_of = line_of
        self._hops = _channels(layout, line_of)
        self._cells: dict[_Cell, int] = {}
        #: Which edges go up and down through a cell, and which along it.
        self._owners: dict[_Cell, tuple[set[_Edge], set[_Edge]]] = {}
        self._letters: dict[_Cell, str] = {}
        #: The last cells of lanes: the cell behind, and the arrow's place, should a line come there from elsewhere.
        self._joins: dict[_Cell, tuple[_Cell, int]] = {}
        self._heads: set[_Cell] = set()
        column = 0
        for layer, names in enumerate(layout.layers):
            width = max((len(columns_of(name)) for name in names), default=1) + 1
            self._put_names(column, width, layer)
            if layer < len(lanes):
                channel = column + width
                column = channel + 2 * len(lanes[layer]) + 5
                self._connect(channel, column, lanes[layer], layer)

    def text(self, characters: str) -> str:
        """The drawing, in the characters given."""
        shown = {cell: characters[sides] for cell, sides in self._cells.items()}
        for cell, (upright, level) in self._owners.items():
            if self._cells[cell] == _UP | _DOWN | _LEFT | _RIGHT and not upright & level:
                shown[cell] = characters[_UP | _DOWN]
        for arrow, (joint, place) in self._joins.items():
            if self._cells[joint] & _LEFT:
                shown[arrow] = characters[place]
        shown |= dict.fromkeys(self._heads, characters[_HEAD])
        shown |= self._letters
        lines: dict[int, dict[int, str]] = {}
        for (row, column), letter in shown.items():
            lines.setdefault(row, {})[column] = letter
        return "\n".join(
            "".join(lines[row].get(column, " ") for column in range(max(lines[row]) + 1)) if row in lines else ""
            for row in range(max(lines) + 1)
        )

    def _put_names(self, column: int, width: int, layer: int) -> None:
        for name in self._layout.layers[layer]:
            row = self._line_of(layer, self._layout.row_of[name])
            letters = columns_of(name)
            self._letters |= {(row, column + number): letter for number, letter in enumerate(letters)}
            if any(edge.parent == name for edge in self._layout.edges):
                self._level(row, column + len(letters) + 1, column + width, (row, row))
        for edge in self._layout.edges:
            place = layer - self._layout.layer_of[edge.parent]
            if 0 < place < len(edge.rows) - 1:
                row = self._line_of(layer, edge.rows[place])
                self._level(row, column, column + width, (row, row))

    def _connect(self, channel: int, column: int, lanes: list[_Lane], layer: int) -> None:
        arrived = {self._line_of(layer + 1, self._layout.row_of[name]) for name in self._layout.layers[layer + 1]}
        for line, target in self._hops[layer]:
            stop = column - 1 if target in arrived else column
            if line == target:
                self._level(line, channel, stop, (line, target))
            else:
                number = next(at for at, lane in enumerate(lanes) if lane.start == line and target in lane.ends)
                self._bend(line, target, channel, channel + 2 + 2 * number, stop)
            if target in arrived:
                self._heads.add((target, column - 2))

    def _bend(self, row: int, target: int, channel: int, lane: int, stop: int) -> None:
        """An edge along its row, up or down its lane, and along its target's row."""
        edge = (row, target)
        self._level(row, channel, lane, edge)
        self._mark((row, lane), _LEFT, edge)
        self._mark((target, lane), _RIGHT, edge)
        self._level(target, lane + 1, stop, edge)
        step = 1 if target > row else -1
        for passed in range(row, target, step):
            self._mark((passed, lane), _DOWN if step > 0 else _UP, edge)
            self._mark((passed + step, lane), _UP if step > 0 else _DOWN, edge)
        if abs(target - row) > 1:
            self._joins[target - step, lane] = ((target, lane), _HEAD + (1 if step > 0 else 2))

    def _level(self, row: int, start: int, stop: int, owner: _Edge) -> None:
        for column in range(start, stop):
            self._mark((row, column), _LEFT | _RIGHT, owner)

    def _mark(self, cell: _Cell, sides: int, owner: _Edge) -> None:
        self._cells[cell] = self._cells.get(cell, 0) | sides
        upright, level = self._owners.setdefault(cell, (set(), set()))
        (upright if sides & (_UP | _DOWN) else level).add(owner)


def _same_row(layer: int, row: float) -> int:
    return int(row)


def _every_other_lower(layer: int, row: float) -> int:
    return 4 * int(row) + 2 * (layer % 2)


def _channels(layout: Layout, line_of: _LineOf) -> list[list[tuple[int, int]]]:
    """For each channel the lines where its edges begin and end, without doubles."""
    found: list[set[tuple[int, int]]] = [set() for _ in layout.layers[1:]]
    for edge in layout.edges:
        first = layout.layer_of[edge.parent]
        lines = [line_of(first + number, row) for number, row in enumerate(edge.rows)]
        for number, hop in enumerate(pairwise(lines)):
            found[first + number].add(hop)
    return [sorted(hops) for hops in found]


def _lanes(hops: list[tuple[int, int]]) -> list[_Lane]:
    """The lanes of a channel: one for each row that edges leave, or for each edge where one on the way is joined."""
    lanes = []
    for start in sorted({start for start, end in hops if start != end}):
        ends = [end for at, end in hops if at == start != end]
        first, last = min(start, *ends), max(start, *ends)
        on_the_way = [end for end in ends if first < end < last]
        if any(at != start and end in on_the_way for at, end in hops) or len(ends) == 1:
            lanes += [_Lane(start, (end,)) for end in ends]
        else:
            lanes.append(_Lane(start, tuple(ends)))
    return lanes


def _in_order(lanes: list[_Lane]) -> list[_Lane] | None:
    """Those lanes that a channel needs, in order: what comes to a row is behind what leaves it. None: there is none."""
    waiting = list(lanes)
    order: list[_Lane] = []
    while waiting:
        free = [lane for lane in waiting if not any(other.start in lane.ends for other in waiting if other is not lane)]
        if not free:
            return None
        order.append(free[0])
        waiting.remove(free[0])
    return order
