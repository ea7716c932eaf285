"""Cutting a component into groups that can each be one kernel.

A kernel must not need what is computed outside from its own results: the loss between a forward and its backward, the
layers between two attentions that share a mask. So each Einsum of the core gets a *stage*: one more than that of the
core's results that it needs by way of something outside. What depends on a tangent comes after all that does not. A
stage that needs wide tensors of an earlier one computes them again, from the earlier one's narrow results: the maps of
a softmax, not its sums.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ...ir.cascade import Einsum, ranks_of, tensor_name
from ...ir.graph import Graph
from .components import Component, Space, outer_ranks
from .emit import Tensor

#: (1 if it depends on a tangent, number of the stage; -1: depends on no stage).
Level: TypeAlias = "tuple[int, int]"
_FREE: Level = (0, -1)


@dataclass(frozen=True)
class Stage:
    """``einsums`` in order; ``own`` are the outputs of those that are not computed again from an earlier stage."""

    level: Level
    einsums: tuple[Einsum, ...]
    own: frozenset[str]


@dataclass
class Staging:
    """Levels of a graph's values and a cascade's tensors."""

    graph: Graph
    #: Of each node, what it reads.
    operands: Sequence[tuple[str, ...]]
    space: Space
    tensors: Mapping[str, Tensor]
    component: Component
    #: Einsum -> stages that it is put off by, besides what its operands say.
    delays: Mapping[str, Level] = field(default_factory=dict)
    needed: Collection[str] = ()
    inside: dict[str, Level] = field(default_factory=dict)
    outside: dict[str, Level] = field(default_factory=dict)
    nodes: dict[str, Level] = field(default_factory=dict)

    def run(self) -> list[Stage]:
        by_line: dict[int, list[Einsum]] = {}
        for einsum in self.space.einsums:
            by_line.setdefault(einsum.line, []).append(einsum)
        leaf_of = {tensor.nodes[0]: name for name, tensor in self.tensors.items() if tensor.leaf}
        core = frozenset(self.component.core)
        glue: set[str] = set()
        of = self.nodes
        for position, node in enumerate(self.graph.nodes):
            level = _FREE
            for name in self.operands[position]:
                if (other := of.get(name, _FREE)) > level:
                    level = other
            if node.op == "input" and node.role == "tangent" and self.graph.phase == "joint":
                level = (1, -1)
            if node.name in leaf_of:
                self.outside[leaf_of[node.name]] = level
            for einsum in by_line.get(position, ()):
                level = max(level, self._place(einsum, einsum.output in core, glue))
            of[node.name] = level
        return self._stages(core, glue)

    def _place(self, einsum: Einsum, core: bool, glue: set[str]) -> Level:
        reads = einsum.read_names
        needs = [self.inside[name] for name in reads if name in self.inside]
        after = [self.outside.get(name, _FREE) for name in reads if name not in self.inside]
        if not core and not (needs and _is_glue(einsum, self.space, self.inside)):
            level = max((*needs, *after), default=_FREE)
            self.outside[einsum.output] = level
            return level
        level = max((*needs, *((flag, number + 1) for flag, number in after)), default=(0, 0))
        level = max(level, self.delays.get(einsum.output, level))
        self.inside[einsum.output] = level
        if not core:
            glue.add(einsum.output)
        return level

    def _stages(self, core: frozenset[str], glue: set[str]) -> list[Stage]:
        hidden = self._parts_of_ops(core)
        kept = self._useful(core, glue, hidden)
        stages: list[Stage] = []
        #: What later stages read, also to compute wide tensors again.
        read: set[str] = set()
        for level in sorted({self.inside[name] for name in kept}, reverse=True):
            own = {name for name in kept if self.inside[name] == level}
            wanted = {name for name in own if name in read - self.component.wide or self._leaves(name, kept)}
            members = self._needed_for(wanted, own, hidden)
            if any(self.inside.get(name, level) == level for name in members):
                order = sorted(members, key=lambda name: self.space.position[name])
                einsums = tuple(self.space.writer[name] for name in order)
                read |= set().union(*(einsum.read_names for einsum in einsums)) - members
                owned = frozenset(name for name in members if self.inside.get(name, level) == level)
                stages.append(Stage(level, einsums, owned))
        return stages[::-1]

    def _parts_of_ops(self, core: frozenset[str]) -> set[str]:
        """Tensors that only exist inside an op of which the core has a part: nothing else computes them."""
        lines = {self.space.writer[name].line for name in core}
        return {e.output for e in self.space.einsums if e.line in lines and e.output not in core}

    def _leaves(self, name: str, kept: Collection[str]) -> bool:
        """Whether something outside of all stages needs the tensor."""
        if name in self.needed:
            return True
        return any(reader.output not in kept for reader in self.space.readers.get(name, ()))

    def _needed_for(self, wanted: set[str], own: set[str], hidden: set[str]) -> set[str]:
        """The Einsums that compute ``wanted``: of the stage, wide ones, and parts of the same ops."""
        members, waiting = set(wanted), list(wanted)
        while waiting:
            for name in self.space.writer[waiting.pop()].read_names:
                outside = name in hidden and name not in self.inside
                if name not in members and (name in own or name in self.component.wide or outside):
                    members.add(name)
                    waiting.append(name)
        return members

    def _useful(self, core: frozenset[str], glue: set[str], hidden: set[str]) -> set[str]:
        """The core, the glue from which the core goes on in the same stage, and parts of its ops."""
        kept = set(core) | (glue & hidden)
        for einsum in reversed(self.space.einsums):
            if einsum.output in kept:
                level = self.inside[einsum.output]
                for name in einsum.read_names:
                    if name in glue and self.inside[name] == level:
                        kept.add(name)
        return kept


def _is_glue(einsum: Einsum, space: Space, inside: Mapping[str, Level]) -> bool:
    """Whether an Einsum outside the core is cheap enough to be done with it: no larger than a result of the core that
    it reads, and no product of two matrices."""
    if outer_ranks(einsum, space.sizes) is not None:
        return False
    for item in einsum.reads:
        ranks = frozenset().union(*(ranks_of(index) for index in item.args))
        if tensor_name(item) in inside and einsum.space <= ranks:
            return True
    return False
