"""Forward or backward as kernels: which results lie in memory, and which are computed where they are read."""

from __future__ import annotations

from operator import attrgetter

from .problem import JointProblem, Op

#: A result read more than once is stored if computing it reads more than this many tensors (Inductor's threshold).
MOST_READS = 4
_INDEX = attrgetter("index")


class Phase:
    """Which results lie in memory in one phase, and what the ops that make them read."""

    def __init__(self, problem: JointProblem, ops: list[Op], kept: frozenset[int], given: frozenset[int]) -> None:
        self.problem, self.ops, self.kept, self.given = problem, ops, kept, given
        self.members = {op.index for op in ops}
        self._sources: dict[int, tuple[int, ...]] = {}
        self._stored: dict[int, bool] = {}
        #: Result that does not lie in memory -> its op. What is not of this phase lies in memory.
        self._inside: dict[int, int] = {}
        for op in sorted(ops, key=_INDEX):
            sources = self._sources[op.index] = self._reads(op)
            stored = self._stored[op.index] = not op.inlined or self._is_stored(op.writes[0], len(sources))
            if not stored:
                self._inside.update((value, op.index) for value in op.writes if value not in given)

    def stored(self, op: Op) -> bool:
        return self._stored[op.index]

    def sources(self, op: Op) -> tuple[int, ...]:
        """Values in memory that the kernel of ``op`` reads."""
        return self._sources[op.index]

    def _is_stored(self, value: int, reads: int) -> bool:
        """Whether a value that could be computed where it is read, of so many others, lies in memory."""
        if value in self.kept:
            return True
        ops, members, users = self.problem.ops, self.members, 0
        for user in self.problem.users.get(value, ()):
            if user in members:
                if not ops[user].fused:
                    return True
                users += 1
        return users > 1 and reads > MOST_READS

    def _reads(self, op: Op) -> tuple[int, ...]:
        inside = self._inside
        if inside.keys().isdisjoint(op.reads):
            return tuple(dict.fromkeys(op.reads))
        found: dict[int, None] = {}
        for value in op.reads:
            maker = inside.get(value)
            if maker is None:
                found[value] = None
            else:
                found.update(dict.fromkeys(self._sources[maker]))
        return tuple(found)
