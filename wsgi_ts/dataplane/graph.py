"""The graph of a workflow as the data path knows it: nodes, what each of them reads, and what holds for its attempts.

The supervisor makes it of the spec file (`wsgi_ts.workflows`) and publishes it with the routes. Nodes are told by their
place in `Graph.nodes`, which is the order of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from wsgi_ts.dataplane.timings import timing_template

#: What becomes of a workflow, or of a node, when all attempts of the node have failed.
FAIL, SKIP, DEFAULT, TELL = ("fail", "skip", "default", "tell")
#: The key of a row under which a node finds what it reads, where that is one thing.
BODY = "body"
#: The key under which a node with `pass: [request]` finds what the client has sent.
REQUEST = "request"
#: What may stand in the name of a metric of the Server-Timing header.
_NO_TOKEN = re.compile(r"[^!#$%&'*+.^_`|~0-9A-Za-z-]")
#: So long the Server-Timing header gets at most: proxies refuse answers whose whole head is above 4096 bytes.
_MOST_TIMINGS = 2500
#: What stands beside a node's name there: `, `, `;dur=`, and up to a day in milliseconds.
_BESIDE_NAME = 19


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    Attributes:
        name: as in the spec file.
        model: the model that answers its requests.
        version: a version of it; None for the default one.
        is_function: it is a function of the workflow's handler file.
        parents: the nodes whose answers it reads, in the order of the file.
        timeout_ms: how long one attempt may take, waiting included.
        retries: attempts after the first one.
        when: the model that says whether the node runs, "" where it always does.
        on_error: one of ON_ERROR.
        default: what takes the place of the answer under DEFAULT.
        reads_request: whether it also reads what the client has sent.
        scatters: its answer is a list, and what follows runs once for each element, up to a node that gathers.
        gathers: it reads the answers for all elements.
        scatter: the node whose elements this one runs for; -1 where it runs once.
    """

    name: str
    model: str
    version: str | None = None
    is_function: bool = False
    parents: tuple[int, ...] = ()
    timeout_ms: int = 10000
    retries: int = 1
    when: str = ""
    on_error: str = FAIL
    default: str = ""
    reads_request: bool = False
    scatters: bool = False
    gathers: bool = False
    scatter: int = -1


class Graph:
    """A workflow's graph; it has one start, and no cycle.

    Args:
        index: its number on the board; -1 where it is not counted.
        timeout_ms: how long a request may take as a whole; 0 where that is not said.

    Attributes:
        start: the node that reads the client's request.
        children: for each node those that read its answer.
        readers: for each node those whose requests refer to its slot: its children, and of the start all nodes that
            read the client's request.
        inputs: for each node what it reads: key of the row and node.
        ends: the nodes that nobody reads, in the order of the file.
        behind: for each node all that come after it.
        region: for each node that scatters, those that run once for each element.
        counts: for each node how many parents it waits for (-1 where it runs for elements), and how many read it.
        timing_names: of each node its name in the header Server-Timing; only of the first where it would be too long.
        timings_of_all: the value of that header where all nodes have run, with a `%` for the milliseconds of each.
    """

    def __init__(self, name: str, nodes: tuple[Node, ...], index: int = -1, timeout_ms: int = 0) -> None:
        self.name = name
        self.index = index
        self.timeout_ms = timeout_ms
        self.nodes = nodes
        places = range(len(nodes))
        (self.start,) = [place for place in places if not nodes[place].parents]
        children: list[list[int]] = [[] for _ in places]
        for child in places:
            for parent in nodes[child].parents:
                children[parent].append(child)
        self.children = [tuple(each) for each in children]
        asking = tuple(place for place in places if nodes[place].reads_request)
        self.readers = [self.children[place] + (asking if place == self.start else ()) for place in places]
        self.inputs = [self._inputs(node) for node in nodes]
        self.ends = tuple(place for place in places if not self.children[place])
        self.behind = [self._behind(place) for place in places]
        self.region = {
            place: tuple(inner for inner in places if nodes[inner].scatter == place)
            for place in places
            if nodes[place].scatters
        }
        self.counts = [
            (-1 if node.scatter >= 0 else 1 if node.gathers else len(node.parents), len(self.readers[place]))
            for place, node in enumerate(nodes)
        ]
        names = [_NO_TOKEN.sub("_", node.name) for node in nodes]
        ends = accumulate(len(name) + _BESIDE_NAME for name in names)
        self.timing_names = [name for name, end in zip(names, ends, strict=True) if end <= _MOST_TIMINGS]
        self.timings_of_all = timing_template(tuple(self.timing_names))

    @property
    def needed(self) -> list[tuple[str, str | None]]:
        """The models, by name and version, without a ready worker of which a request fails."""
        needed = [node for node in self.nodes if node.on_error in (FAIL, TELL)]
        gates: list[tuple[str, str | None]] = [(node.when, None) for node in needed if node.when]
        return [*((node.model, node.version) for node in needed), *gates]

    def _inputs(self, node: Node) -> tuple[tuple[str, int], ...]:
        if len(node.parents) == 1:
            return ((BODY, node.parents[0]),)
        return tuple((self.nodes[parent].name, parent) for parent in node.parents)

    def _behind(self, place: int) -> frozenset[int]:
        found: set[int] = set()
        to_see = list(self.children[place])
        while to_see:
            node = to_see.pop()
            if node not in found:
                found.add(node)
                to_see += self.children[node]
        return frozenset(found)

    def to_json(self) -> dict[str, Any]:
        """The graph as it is published."""
        return {"nodes": [asdict(node) for node in self.nodes], "timeout_ms": self.timeout_ms}

    @classmethod
    def from_json(cls, name: str, fields: Mapping[str, Any]) -> Graph:
        """The graph that `to_json` has given these fields of."""
        nodes = tuple(Node(**{**node, "parents": tuple(node["parents"])}) for node in fields["nodes"])
        return cls(name, nodes, fields.get("index", -1), fields.get("timeout_ms", 0))
