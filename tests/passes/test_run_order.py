"""Whether groups can be run one after the other: against a graph of what waits for what, on random graphs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import networkx
from effcc.passes.raising.run_order import RunOrder
from fresh_seed import fresh_random


class CountedNode:
    """A node that counts how often its operands are asked for."""

    def __init__(self, name: str, reads: tuple[str, ...]) -> None:
        self.name, self.reads, self.asked = name, reads, 0

    def operands(self) -> tuple[str, ...]:
        self.asked += 1
        return self.reads


def random_graph(rng: random.Random) -> list[CountedNode]:
    names: list[str] = []
    nodes = []
    for number in range(rng.randint(4, 25)):
        nodes.append(CountedNode(f"n{number}", tuple(rng.sample(names, min(len(names), rng.randint(0, 3))))))
        names.append(nodes[-1].name)
    return nodes


def random_groups(rng: random.Random, nodes: list[CountedNode]) -> list[Any]:
    """Of results that no other group has. What a group needs may be computed from what it makes."""
    names = [node.name for node in nodes]
    left = rng.sample(names, len(names))
    groups = []
    for number in range(rng.randint(1, 4)):
        results, left = tuple(left[:2]), left[2:]
        if not results:
            break
        latest = max(map(names.index, results))
        before = names[: max(1, latest if rng.random() < 0.7 else len(names))]
        operands = tuple(rng.sample(before, min(len(before), rng.randint(1, 3))))
        rests = (SimpleNamespace(value=results[1]),) if len(results) > 1 else ()
        groups.append(SimpleNamespace(name=f"g{number}", operands=operands, results=results[:1], rests=rests))
    return groups


def acyclic(nodes: list[CountedNode], groups: list[Any]) -> bool:
    order = networkx.DiGraph()
    made = {name: f"group {group.name}" for group in groups for name in group.results}
    made |= {rest.value: f"group {group.name}" for group in groups for rest in group.rests}
    for node in nodes:
        if node.name not in made:
            order.add_edges_from((made.get(name, name), node.name) for name in node.reads)
    for group in groups:
        order.add_edges_from((made.get(name, name), f"group {group.name}") for name in group.operands)
    return bool(networkx.is_directed_acyclic_graph(order))


def test_it_says_what_a_graph_of_what_waits_for_what_says() -> None:
    rng = fresh_random()
    answers = []
    for _ in range(400):
        nodes = random_graph(rng)
        order = RunOrder(SimpleNamespace(nodes=nodes))  # type: ignore[arg-type]
        for _ in range(3):
            groups = random_groups(rng, nodes)
            answers.append(order.runnable(groups))
            assert answers[-1] == acyclic(nodes, groups), (
                [(node.name, node.reads) for node in nodes],
                [(group.operands, group.results, group.rests) for group in groups],
            )
    assert any(answers) and not all(answers)


def test_the_graph_is_read_once() -> None:
    nodes = random_graph(random.Random(1))
    order = RunOrder(SimpleNamespace(nodes=nodes))  # type: ignore[arg-type]
    for seed in range(5):
        order.runnable(random_groups(random.Random(seed), nodes))
    assert [node.asked for node in nodes] == [1] * len(nodes)
