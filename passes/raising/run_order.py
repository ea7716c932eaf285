"""Whether groups of a graph's ops can be run one after the other, each at once.

Asked of many sets of groups of one graph, whose own order is read once. Without groups the graph has no circle, so that
every circle goes through a group's result: the walk goes back from the groups alone, and no further than the earliest
of their results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.graph import Graph
from .group import Group


class RunOrder:
    def __init__(self, graph: Graph) -> None:
        self.operands: dict[str, tuple[str, ...]] = {node.name: tuple(node.operands()) for node in graph.nodes}
        self.position = {name: number for number, name in enumerate(self.operands)}

    def runnable(self, groups: Sequence[Group]) -> bool:
        """False where groups wait for each other, be it for a value that ops between them compute."""
        maker: dict[str, int] = {}
        for number, group in enumerate(groups):
            maker |= dict.fromkeys((*group.results, *(rest.value for rest in group.rests)), number)
        first = min((self.position.get(name, 0) for name in maker), default=0)
        done: set[str | int] = set()
        for start in range(len(groups)):
            if start in done:
                continue
            inside: set[str | int] = {start}
            path: list[tuple[str | int, Iterator[str]]] = [(start, iter(groups[start].operands))]
            while path:
                here, waiting = path[-1]
                name = next(waiting, None)
                if name is None:
                    path.pop()
                    inside.discard(here)
                    done.add(here)
                    continue
                needed: str | int = maker.get(name, name)
                if needed in inside:
                    return False
                # What lies before all results needs no group. A value that is no node's is given.
                if needed in done or (isinstance(needed, str) and self.position.get(needed, -1) < first):
                    continue
                inside.add(needed)
                reads = groups[needed].operands if isinstance(needed, int) else self.operands[needed]
                path.append((needed, iter(reads)))
        return True
