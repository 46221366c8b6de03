"""Circles in a graph of waits."""

from __future__ import annotations

import pytest

from hmm_server.circles import Edge, circles


def _graph(text: str) -> dict[int, list[Edge]]:
    """Edges written as "12 23 31"; nodes are digits."""
    graph: dict[int, list[Edge]] = {int(digit): [] for digit in text.replace(" ", "")}
    for edge in text.split():
        graph[int(edge[0])].append(Edge(int(edge[1])))
    return graph


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("12 23 34", []),
        ("11", [[1]]),
        ("12 23 31", [[1, 2, 3]]),
        ("12 23 32", [[2, 3]]),
        ("12 21 34 43", [[1, 2], [3, 4]]),
        ("12 13 24 34", []),
        ("12 23 31 14 41", [[1, 2, 3], [1, 4]]),
        ("41 12 21", [[1, 2]]),
    ],
)
def test_circles_finds_each_circle_once(text: str, expected: list[list[int]]) -> None:
    """Chains and diamonds are no circles; a node that waits for itself is one."""
    found = [sorted(node for node, _ in circle) for circle in circles(_graph(text))]
    assert sorted(found) == expected


def test_circles_returns_the_edges_that_leave_the_nodes() -> None:
    """Each node of a circle comes with the edge to the next, and what is known of it."""
    graph = {1: [Edge(9), Edge(2, mirror_id=7)], 2: [Edge(1, mirror_id=8, suspected=True)]}
    (circle,) = circles(graph)
    assert circle == [(1, Edge(2, 7)), (2, Edge(1, 8, True))]


def test_circles_follows_long_chains() -> None:
    """Depth is bounded by memory, not by the interpreter's stack."""
    graph = {node: [Edge(node + 1)] for node in range(5000)} | {5000: [Edge(0)]}
    (circle,) = circles(graph)
    assert len(circle) == 5001
