"""The fast minimum cut is networkx's, node by node: values, sides, and refusal where there is no finite cut."""

from __future__ import annotations

import math
import random

import networkx
import pytest
from effcc.frontend.min_cut import fast_minimum_cut, minimum_cut


def random_graph(draw: random.Random) -> networkx.DiGraph:
    graph = networkx.DiGraph()
    names = ["source", "sink", *(f"n{index}" for index in range(draw.randrange(1, 12)))]
    graph.add_nodes_from(names)
    for _ in range(draw.randrange(1, 40)):
        start, end = draw.sample(names, 2)
        graph.add_edge(start, end, capacity=draw.choice([0, 1, 2, 3, 5, 5, 4.0, math.inf]))
    return graph


def test_random_graphs() -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    unbounded = 0
    for _ in range(500):
        graph = random_graph(draw)
        found = minimum_cut(graph, "source", "sink")
        try:
            expected = networkx.minimum_cut(graph, "source", "sink")
        except networkx.NetworkXUnbounded:
            assert found is None, seed
            unbounded += 1
            continue
        assert found == expected, (seed, list(graph.edges(data=True)))
    assert 0 < unbounded < 500, seed


@pytest.mark.parametrize("capacity", [0.5, 2**61, -1])
def test_capacities_that_the_solver_cannot_take(capacity: float) -> None:
    graph = networkx.DiGraph()
    graph.add_edge("source", "sink", capacity=capacity)
    assert minimum_cut(graph, "source", "sink") is None


def test_the_slow_way_is_taken_when_not_active_and_for_an_unbounded_flow() -> None:
    graph = networkx.DiGraph()
    graph.add_edge("source", "a", capacity=3)
    graph.add_edge("a", "sink", capacity=2)
    calls: list[str] = []

    def original(*args: object, **kwargs: object) -> object:
        calls.append("slow")
        return networkx.minimum_cut(*args, **kwargs)

    active = [True]
    cut = fast_minimum_cut(original, lambda: active[0])
    fast = cut(graph, "source", "sink")
    assert not calls
    active[0] = False
    assert cut(graph, "source", "sink") == fast and calls == ["slow"]
    active[0] = True
    graph.add_edge("source", "sink", capacity=math.inf)
    with pytest.raises(networkx.NetworkXUnbounded):
        cut(graph, "source", "sink")
