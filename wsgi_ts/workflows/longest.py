"""How long a request of a workflow can take until it is answered, by the time-outs of its nodes.

Each attempt of a node has a limit, and a node has a limited number of attempts, one after the other. So every graph has
a longest time; it is told, and holds without a clock of its own (batcher/README.md, rule 16).
"""

from __future__ import annotations

from wsgi_ts.dataplane.graph import Graph, Node
from wsgi_ts.dataplane.graph_walk import MOST_ELEMENTS
from wsgi_ts.quick_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Longest:
    """The longest time.

    Attributes:
        ms: of a request whose lists have up to MOST_ELEMENTS elements, in milliseconds.
        path: the nodes that it comes from, in their order.
        more_ms: for each node that scatters, what each further MOST_ELEMENTS elements of its list can add; empty where
            the workflow has a limit as a whole.
        is_limit: whether it is the workflow's own limit, which is below what its nodes could take.
    """

    ms: int
    path: tuple[str, ...]
    more_ms: dict[str, int]
    is_limit: bool = False

    def __str__(self) -> str:
        """In words, for who reads a report."""
        if self.is_limit:
            return f"a request is answered within {_shown(self.ms)}: timeout-ms of the options"
        told = f"a request is answered within {_shown(self.ms)}, all attempts of {', '.join(self.path)}"
        for name, more in self.more_ms.items():
            told += f"; {_shown(more)} more for each further {MOST_ELEMENTS} elements of {name}"
        return told


def longest(graph: Graph) -> Longest:
    """Finds the longest time of a graph: its slowest path, or the limit of the workflow where that is shorter."""
    until_ms, path = _slowest_path(graph)
    more_ms = {
        graph.nodes[place].name: sum(_attempts_ms(graph.nodes[inner]) for inner in region)
        for place, region in graph.region.items()
    }
    if graph.timeout_ms and (more_ms or graph.timeout_ms < until_ms):
        return Longest(graph.timeout_ms, (), {}, is_limit=True)
    return Longest(until_ms, path, more_ms)


def _slowest_path(graph: Graph) -> tuple[int, tuple[str, ...]]:
    """Milliseconds until the last node has ended at the latest, and the nodes on the way there."""
    until_ms = [0] * len(graph.nodes)
    paths: list[tuple[str, ...]] = [()] * len(graph.nodes)
    awaited = [len(node.parents) for node in graph.nodes]
    ready = [graph.start]
    for place in ready:
        node = graph.nodes[place]
        latest = max(node.parents, key=until_ms.__getitem__, default=place)
        until_ms[place] = until_ms[latest] + _attempts_ms(node)
        paths[place] = (*paths[latest], node.name)
        for child in graph.children[place]:
            awaited[child] -= 1
            if not awaited[child]:
                ready.append(child)
    last = max(graph.ends, key=until_ms.__getitem__)
    return until_ms[last], paths[last]


def _attempts_ms(node: Node) -> int:
    """All attempts of a node; the function that says whether it runs has as many of its own."""
    return (2 if node.when else 1) * (1 + node.retries) * node.timeout_ms


def _shown(milliseconds: int) -> str:
    return f"{milliseconds / 1000:g} s"
