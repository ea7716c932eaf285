"""Forward or backward as kernels: which results lie in memory, and which are computed where they are read."""

from __future__ import annotations

from operator import attrgetter

from .problem import JointProblem, Op

#: A result read more than once is stored if computing it reads more than this many tensors (Inductor's threshold).
MOST_READS = 4
_INDEX = attrgetter("index")


class Phase:
    """Which results lie in memory in one phase, and what the ops that make them read.

    ``stored``: op -> whether its results lie in memory. ``sources``: op -> values in memory that its kernel reads.
    """

    def __init__(self, problem: JointProblem, ops: list[Op], kept: frozenset[int], given: frozenset[int]) -> None:
        self.problem, self.ops, self.kept = problem, ops, kept
        self.members = {op.index for op in ops}
        self.sources: dict[int, tuple[int, ...]] = {}
        self.stored: dict[int, bool] = {}
        #: Result that does not lie in memory -> what is read in its place. What is not of this phase lies in memory.
        inside: dict[int, tuple[int, ...]] = {}
        reads, read_inside = problem.distinct_reads, inside.keys()
        all_sources, all_stored, is_stored = self.sources, self.stored, self._is_stored
        for op in sorted(ops, key=_INDEX):
            index = op.index
            sources = reads[index]
            if not read_inside.isdisjoint(sources):
                parts: list[int] = []
                for value in sources:
                    if value in inside:
                        parts += inside[value]
                    else:
                        parts.append(value)
                sources = tuple(dict.fromkeys(parts))
            all_sources[index] = sources
            if not op.inlined or (writes := op.writes)[0] in kept or is_stored(writes[0], len(sources)):
                all_stored[index] = True
                continue
            all_stored[index] = False
            for value in writes:
                if value not in given:
                    inside[value] = sources

    def _is_stored(self, value: int, reads: int) -> bool:
        """Whether a value that could be computed where it is read, of so many others, lies in memory though nobody
        keeps it."""
        members = self.members
        if not members.isdisjoint(self.problem.library_users.get(value, ())):
            return True
        return reads > MOST_READS and sum(user in members for user in self.problem.users.get(value, ())) > 1
