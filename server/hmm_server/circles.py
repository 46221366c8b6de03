"""Circles in a graph of waits: calls that wait for one another and can never end by themselves.

**Source**: depth-first search; an edge back to a node on the present path closes a circle.

**Invariants**: every node that lies on a circle is on one that is found, unless it lies on several.

**Absent**: what waits for what (waits.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hmm.units import MirrorId


class Edge(NamedTuple):
    """One call waits for another.

    Attributes:
        to: the call that has to get on first.
        mirror_id: that call is made from inside a callback of this mirror, whose answer is awaited; 0 for none.
        suspected: it carries no mark that says so.
    """

    to: int
    mirror_id: MirrorId = 0
    suspected: bool = False


def circles(edges: Mapping[int, Sequence[Edge]]) -> Iterator[list[tuple[int, Edge]]]:
    """The circles of a graph, each as its nodes with the edge that leaves each of them.

    Cost: O(nodes + edges) and the length of the circles.
    """
    finished: set[int] = set()
    for root in edges:
        if root in finished:
            continue
        path: dict[int, Edge] = {}
        stack: list[tuple[int, Iterator[Edge]]] = [(root, iter(edges[root]))]
        while stack:
            node, leaving = stack[-1]
            edge = next(leaving, None)
            if edge is None:
                stack.pop()
                path.pop(node, None)
                finished.add(node)
                continue
            path[node] = edge
            if edge.to in path:
                nodes = list(path)
                yield [(one, path[one]) for one in nodes[nodes.index(edge.to) :]]
            elif edge.to in edges and edge.to not in finished:
                stack.append((edge.to, iter(edges[edge.to])))
