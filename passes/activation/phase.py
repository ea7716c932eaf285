"""Forward or backward as kernels: which results lie in memory, and which are computed where they are read."""

from __future__ import annotations

from .problem import JointProblem, Op

#: A result read more than once is stored if computing it reads more than this many tensors (Inductor's threshold).
MOST_READS = 4


class Phase:
    """Which results lie in memory in one phase, and what the ops that make them read."""

    def __init__(self, problem: JointProblem, ops: list[Op], kept: frozenset[int], given: frozenset[int]) -> None:
        self.problem, self.ops, self.kept, self.given = problem, ops, kept, given
        self.members = {op.index for op in ops}
        self._sources: dict[int, tuple[int, ...]] = {}
        self._stored: dict[int, bool] = {}
        for op in sorted(ops, key=lambda op: op.index):
            self._sources[op.index] = self._reads(op)
            self._stored[op.index] = self._is_stored(op)

    def stored(self, op: Op) -> bool:
        return self._stored[op.index]

    def sources(self, op: Op) -> tuple[int, ...]:
        """Values in memory that the kernel of ``op`` reads."""
        return self._sources[op.index]

    def _is_stored(self, op: Op) -> bool:
        if not op.inlined or op.writes[0] in self.kept:
            return True
        ops, members = self.problem.ops, self.members
        users = [u for u in self.problem.users.get(op.writes[0], ()) if u in members]
        for user in users:
            if not ops[user].fused:
                return True
        return len(users) > 1 and len(self._sources[op.index]) > MOST_READS

    def _reads(self, op: Op) -> tuple[int, ...]:
        found: dict[int, None] = {}
        values, given, stored = self.problem.values, self.given, self._stored
        for value in op.reads:
            maker = values[value].op
            # What is not of this phase lies in memory.
            if stored.get(maker, True) or value in given:
                found[value] = None
            else:
                found.update(dict.fromkeys(self._sources[maker]))
        return tuple(found)
