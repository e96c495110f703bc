"""Where the nodes of a graph are drawn: in layers from left to right, with few crossings and straight edges.

Each node stands one layer behind the last of its parents. An edge over several layers runs through a point in each of
them, which takes part in the order of the layer as a node does. The order follows the medians of the neighbours; the
heights then settle each between those of its neighbours, at least one row apart.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import pairwise

from wsgi_ts.quick_dataclass import dataclass

_ORDER_SWEEPS = 12
_HEIGHT_SWEEPS = 40

#: A node's name; or parent, child and layer of a point of a long edge.
_Item = str | tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge as it is drawn.

    Attributes:
        rows: its height in each layer from that of its parent to that of its child, both included.
    """

    parent: str
    child: str
    rows: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A drawn graph.

    Attributes:
        layers: the nodes of each layer, from above.
        layer_of: the layer of each node.
        row_of: the height of each node, in rows from 0; not whole where a node stands between two others.
        edges: all edges, in file order.
    """

    layers: tuple[tuple[str, ...], ...]
    layer_of: Mapping[str, int]
    row_of: Mapping[str, float]
    edges: tuple[Edge, ...]
    rows: float


def lay_out(order: Sequence[str], successors: Mapping[str, Sequence[str]], *, whole_rows: bool = False) -> Layout:
    """Lays out an acyclic graph, each node of `order` behind its parents; with characters rows are whole ones."""
    layer_of = dict.fromkeys(order, 0)
    for name in order:
        for child in successors[name]:
            layer_of[child] = max(layer_of[child], layer_of[name] + 1)
    grid = _Grid(order, successors, layer_of)
    grid.put_in_order()
    row_of = grid.settled_rows(1.0 if whole_rows else 0.5)
    edges = tuple(
        Edge(name, child, tuple(row_of[item] for item in grid.path(name, child)))
        for name in order
        for child in successors[name]
    )
    nodes = {item: row for item, row in row_of.items() if isinstance(item, str)}
    layers = tuple(tuple(item for item in layer if isinstance(item, str)) for layer in grid.layers)
    return Layout(layers, layer_of, nodes, edges, max(row_of.values()) + 1)


@dataclass(slots=True)
class _Grid:
    """The nodes and points, layer by layer, and how they hang together."""

    order: Sequence[str]
    successors: Mapping[str, Sequence[str]]
    layer_of: Mapping[str, int]
    layers: list[list[_Item]] = field(init=False)
    before: dict[_Item, list[_Item]] = field(default_factory=dict)
    behind: dict[_Item, list[_Item]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = [[] for _ in range(max(self.layer_of.values()) + 1)]
        for name in self.order:
            self._add(name, self.layer_of[name])
        for name in self.order:
            for child in self.successors[name]:
                path = self.path(name, child)
                for layer, item in enumerate(path[1:-1], start=self.layer_of[name] + 1):
                    self._add(item, layer)
                for left, right in pairwise(path):
                    self.behind[left].append(right)
                    self.before[right].append(left)

    def _add(self, item: _Item, layer: int) -> None:
        self.layers[layer].append(item)
        self.before[item], self.behind[item] = [], []

    def path(self, parent: str, child: str) -> list[_Item]:
        """The nodes and points of an edge."""
        between = range(self.layer_of[parent] + 1, self.layer_of[child])
        return [parent, *((parent, child, layer) for layer in between), child]

    def put_in_order(self) -> None:
        """Sorts each layer by the medians of the neighbours, and keeps the best order seen."""
        best = self.layers
        fewest = self._crossings()
        for sweep in range(_ORDER_SWEEPS):
            forward = sweep % 2 == 0
            neighbours = self.before if forward else self.behind
            for layer in self.layers if forward else reversed(self.layers):
                places = {item: place for row in self.layers for place, item in enumerate(row)}
                layer.sort(key=lambda item: _median([places[other] for other in neighbours[item]], places[item]))
            crossings = self._crossings()
            if crossings < fewest:
                fewest = crossings
                best = [list(layer) for layer in self.layers]
            elif sweep == 0:
                best = [list(layer) for layer in self.layers] if crossings == fewest else best
        self.layers = [list(layer) for layer in best]

    def _crossings(self) -> int:
        count = 0
        for left, right in pairwise(self.layers):
            place = {item: number for number, item in enumerate(right)}
            above: list[int] = []  # where the edges end that begin above, or at the same item and end above
            for item in left:
                for end in sorted(place[child] for child in self.behind[item]):
                    count += len(above) - bisect_right(above, end)
                    insort(above, end)
        return count

    def settled_rows(self, step: float = 0.5) -> dict[_Item, float]:
        """The heights, in steps: each between its neighbours, at least a row apart from those of its layer."""
        rows = self._centred()
        for sweep in range(_HEIGHT_SWEEPS):
            for layer in self.layers if sweep % 2 == 0 else reversed(self.layers):
                wishes = []
                for item in layer:
                    near = self.before[item] + self.behind[item]
                    wishes.append(sum(rows[other] for other in near) / len(near) if near else rows[item])
                for item, row in zip(layer, _apart(wishes), strict=True):
                    rows[item] = row
        stepped: dict[_Item, float] = {}
        for layer in self.layers:
            least = -math.inf
            for item in layer:
                before = self.before[item]
                # What is alone behind a node stands at its height.
                is_alone = len(before) == 1 and len(self.behind[before[0]]) == 1
                wish = stepped[before[0]] if is_alone else math.floor(rows[item] / step + 0.5) * step
                stepped[item] = max(least, wish)
                least = stepped[item] + 1
        lowest = min(stepped.values())
        return {item: row - lowest for item, row in stepped.items()}

    def _centred(self) -> dict[_Item, float]:
        highest = max(len(layer) for layer in self.layers)
        return {item: number + (highest - len(layer)) / 2 for layer in self.layers for number, item in enumerate(layer)}


def _median(places: list[int], place: int) -> float:
    if not places:
        return place
    ordered = sorted(places)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _apart(wishes: list[float]) -> list[float]:
    """The heights nearest to those that are wished for, in the same order and at least 1 apart (least squares)."""
    blocks: list[tuple[float, int]] = []  # mean of what its members wish for their first, and how many they are
    for number, wish in enumerate(wishes):
        mean, count = wish - number, 1
        while blocks and blocks[-1][0] > mean:
            before, members = blocks.pop()
            mean = (mean * count + before * members) / (count + members)
            count += members
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [mean + number for number, mean in enumerate(flat)]
