"""A workflow's graph as a picture: SVG without scripts, fonts or links, for light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from wsgi_ts.workflows.drawing import columns_of, describe_options
from wsgi_ts.workflows.layout import Edge, Layout, lay_out
from wsgi_ts.workflows.spec import Node, NodeKind, WorkflowSpec

Theme = Literal["auto", "light", "dark"]

#: Pixels.
_NODE_HEIGHT, _LEAST_WIDTH, _TEXT_MARGIN = 50, 84, 16
_ROW_GAP, _COLUMN_GAP, _SCATTER_GAP, _MARGIN, _STUB = 24, 56, 24, 10, 64
#: Width of a character of the name and of the line below it, on the safe side of usual fonts.
_NAME_CHAR, _DETAIL_CHAR = 8.0, 6.2

_COLOURS = {
    "light": {
        "text": "#1b2430",
        "detail": "#55606e",
        "line": "#8792a2",
        "model": "#e6f0fd",
        "model-line": "#4a86d8",
        "function": "#f5f3ee",
        "function-line": "#a9a297",
        "note": "#9a5b00",
    },
    "dark": {
        "text": "#e8eef6",
        "detail": "#a3b1c2",
        "line": "#7d8998",
        "model": "#172840",
        "model-line": "#5b93e0",
        "function": "#292724",
        "function-line": "#8b847a",
        "note": "#e0a458",
    },
}

_STYLE = """
svg {{ {light} }}
{dark}
text {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
.name {{ font-size: 14px; font-weight: 600; fill: {text}; text-anchor: middle; }}
.detail {{ font-size: 11px; fill: {detail}; text-anchor: middle; }}
.note {{ font-size: 11px; fill: {note}; text-anchor: middle; }}
.end {{ font-size: 11px; fill: {line}; }}
.edge {{ fill: none; stroke: {line}; stroke-width: 1.6; }}
.head {{ fill: {line}; }}
.model {{ fill: {model}; stroke: {model-line}; stroke-width: 1.4; }}
.function {{ fill: {function}; stroke: {function-line}; stroke-width: 1.4; }}
.may-be-left-out {{ stroke-dasharray: 5 4; }}
"""


def svg(spec: WorkflowSpec, title: str, *, theme: Theme = "auto") -> str:
    """The picture, from left to right; its colours are by default those that the reader has set."""
    layout = lay_out(spec.order, {name: node.successors for name, node in spec.nodes.items()})
    places = _Places(spec, layout)
    parts = [_edge(edge, places, layout, spec) for edge in layout.edges]
    start = places.boxes[spec.start]
    parts.append(_request_stub(start.left, start.middle))
    parts += [_answer_stub(places.boxes[name].right, places.boxes[name].middle) for name in spec.leaves]
    parts += [_node(node, places) for node in spec.nodes.values()]
    width, height = places.size
    description = f"{', '.join(spec.order)}; {spec.dag_text}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">\n<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>\n'
    )
    return f"{head}<style>{_style(theme)}</style>\n" + "\n".join(parts) + "\n</svg>\n"


def _style(theme: Theme) -> str:
    if theme != "auto":
        return _STYLE.format(light="", dark="", **_COLOURS[theme])
    variables = {key: f"var(--{key})" for key in _COLOURS["light"]}
    light, dark = (
        "; ".join(f"--{key}: {value}" for key, value in _COLOURS[name].items()) for name in ("light", "dark")
    )
    return _STYLE.format(light=light, dark=f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}", **variables)


@dataclass(frozen=True, slots=True)
class _Labels:
    """What stands in a node: its name, what it is, and what else there is to say."""

    name: str
    detail: str
    note: str

    @property
    def width(self) -> float:
        """The node's width."""
        name, *details = (len(columns_of(text)) for text in (self.name, self.detail, self.note))
        longest = max(name * _NAME_CHAR, max(details) * _DETAIL_CHAR)
        return max(_LEAST_WIDTH, longest + 2 * _TEXT_MARGIN)

    @property
    def height(self) -> float:
        """The node's height."""
        return _NODE_HEIGHT + (15 if self.note else 0)


def _labels(node: Node) -> _Labels:
    numbers, shared = node.numbers, node.options.model
    if shared is not None:
        detail = f"uses {shared.name}{f' {shared.version}' if shared.version else ''}"
    elif node.kind is NodeKind.FUNCTION:
        detail = "function" if numbers.batch_size == 1 else f"function · batch {numbers.batch_size}"
    else:
        workers = max(0, numbers.max_workers)
        batch = f" · batch {numbers.batch_size}" if numbers.batch_size > 1 else ""
        detail = f"{workers} worker{'' if workers == 1 else 's'}{batch}"
    return _Labels(node.name, detail, ", ".join(describe_options(node)))


class _Box(NamedTuple):
    """A node: its left and right end, where edges come and leave, and the middle from above."""

    left: float
    right: float
    middle: float


class _Places:
    """Where everything is, in pixels."""

    def __init__(self, spec: WorkflowSpec, layout: Layout) -> None:
        self.labels = {name: _labels(node) for name, node in spec.nodes.items()}
        self._pitch = max(labels.height for labels in self.labels.values()) + _ROW_GAP
        self._columns: list[tuple[float, float]] = []
        left: float = _MARGIN + _STUB
        for names in layout.layers:
            width = max((self.labels[name].width for name in names), default=0)
            self._columns.append((left, width))
            scatters = any(spec.nodes[name].options.scatter for name in names)
            gap = _COLUMN_GAP + (_SCATTER_GAP if scatters else 0)
            left += width + gap
        self.size = (left - gap + _STUB + _MARGIN, (layout.rows - 1) * self._pitch + self._pitch - 2)
        self.boxes = {
            name: _Box(*self.column(layout.layer_of[name]), self.row(row)) for name, row in layout.row_of.items()
        }

    def row(self, row: float) -> float:
        """The middle of a row."""
        return round(row * self._pitch + self._pitch / 2 - 1, 1)

    def column(self, layer: int) -> tuple[float, float]:
        """Left and right end of a layer."""
        left, width = self._columns[layer]
        return left, left + width


def _node(node: Node, places: _Places) -> str:
    labels = places.labels[node.name]
    left, right, middle = places.boxes[node.name]
    top = middle - labels.height / 2
    kind = "model" if node.kind is NodeKind.MODEL else "function"
    left_out = node.options.when is not None or node.options.on_error == "skip"
    radius = 7 if kind == "model" else labels.height / 2
    lines = [(21, "name", labels.name), (37, "detail", labels.detail)]
    if labels.note:
        lines.append((52, "note", labels.note))
    texts = "".join(
        f'<text class="{style}" x="{(left + right) / 2:g}" y="{top + y:g}">{escape(text)}</text>'
        for y, style, text in lines
    )
    return (
        f"<g><title>{escape(_tooltip(node))}</title>"
        f'<rect class="{kind}{" may-be-left-out" if left_out else ""}" x="{left:g}" y="{top:g}" '
        f'width="{right - left:g}" height="{labels.height:g}" rx="{min(radius, 22):g}"/>{texts}</g>'
    )


def _tooltip(node: Node) -> str:
    numbers = node.numbers
    told = [node.name, node.url or node.kind.value, *describe_options(node)]
    told.append(f"{1 + numbers.retry_attempts} attempts of {numbers.timeout_ms} ms")
    return ", ".join(told)


def _edge(edge: Edge, places: _Places, layout: Layout, spec: WorkflowSpec) -> str:
    first = layout.layer_of[edge.parent]
    parent, child = places.boxes[edge.parent], places.boxes[edge.child]
    points = [(parent.right, parent.middle)]
    for number, row in enumerate(edge.rows[1:-1], start=first + 1):
        left, right = places.column(number)
        points += [(left, places.row(row)), (right, places.row(row))]
    points.append((child.left - 7, child.middle))
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for number, ((x, y), (to_x, to_y)) in enumerate(pairwise(points)):
        if number % 2 or y == to_y:
            path += f" L{to_x:g} {to_y:g}"
        else:
            half = (x + to_x) / 2
            path += f" C{half:g} {y:g} {half:g} {to_y:g} {to_x:g} {to_y:g}"
    label = ""
    if spec.nodes[edge.parent].options.scatter:
        x = (points[0][0] + points[1][0]) / 2
        label = f'<text class="note" x="{x:g}" y="{(points[0][1] + points[1][1]) / 2 - 8:g}">each item</text>'
    return f'<path class="edge" d={quoteattr(path)}/>{_head(child.left, child.middle)}{label}'


def _head(x: float, y: float) -> str:
    return f'<path class="head" d="M{x - 1:g} {y:g} l-9 -4.5 v9 z"/>'


def _request_stub(x: float, y: float) -> str:
    """The short arrow by which a request comes to a node."""
    line = f'<path class="edge" d="M{x - _STUB:g} {y:g} H{x - 7:g}"/>{_head(x, y)}'
    return f'{line}<text class="end" x="{x - _STUB:g}" y="{y - 7:g}">request</text>'


def _answer_stub(x: float, y: float) -> str:
    """The short arrow by which an answer leaves a node."""
    end = x + _STUB - 4
    line = f'<path class="edge" d="M{x:g} {y:g} H{end - 7:g}"/>{_head(end, y)}'
    return f'{line}<text class="end" x="{end - 10:g}" y="{y - 7:g}" text-anchor="end">answer</text>'
