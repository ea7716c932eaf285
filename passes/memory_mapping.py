"""Offsets for the buffers of a plan: each arena (a tier's pool) is one offset-assignment problem.

rewrite: ``Buffer(id=7, lower=3, upper=9, bytes=4096, pool="scratch")`` -> ``Buffer(..., offset=8192)``
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np

from ..cost_model.offset_assignment.problem import Problem
from ..cost_model.offset_assignment.solver import solve
from ..errors import MappingError
from ..ir.plan import Buffer, Solver

#: A height within this share of the bound ends the search: a plan's bytes are not worth more of its time.
_TOLERANCE = 0.002
#: Searches in compiled code, which may have to be compiled first, are for more than this share.
_WORTHWHILE = 0.01


def map_memory(
    buffers: Sequence[Buffer], *, time_limit: float = 2.0, seed: int = 0
) -> tuple[list[Buffer], dict[str, int], tuple[Solver, ...]]:
    """Give every buffer an offset in the arena of its tier and pool.

    Args:
        time_limit: seconds for all arenas together.
        seed: of the searches' random choices.

    Returns:
        The buffers in the order given, with offsets; bytes of each arena, by ``Buffer.arena_key``; for each arena how
        it was solved, its height in bytes and the lower bound.

    Raises:
        MappingError: a lifetime is empty, a size negative, or an alignment not positive.
    """
    arenas: dict[str, list[int]] = defaultdict(list)
    for index, buffer in enumerate(buffers):
        if buffer.lower >= buffer.upper or buffer.bytes < 0 or buffer.alignment < 1:
            raise MappingError(
                f"buffer {buffer.id} ({buffer.name!r}) cannot be placed: lifetime [{buffer.lower}, {buffer.upper}), "
                f"{buffer.bytes} bytes, alignment {buffer.alignment}",
                where=buffer.source,
                remedy="a lifetime is at least one step, a size at least 0 and an alignment at least 1",
            )
        arenas[buffer.arena_key].append(index)
    offsets = [0] * len(buffers)
    heights: dict[str, int] = {}
    solvers: list[Solver] = []
    deadline = time.perf_counter() + time_limit
    for number, (key, members) in enumerate(sorted(arenas.items())):
        begin = time.perf_counter()
        rows = [(b.lower, b.upper, b.bytes, b.alignment) for b in (buffers[index] for index in members)]
        lower, upper, size, alignment = np.array(rows, np.int64).T
        problem = Problem(lower, upper, size, alignment)
        left = max(deadline - begin, 0.0) / (len(arenas) - number)
        result = solve(problem, time_limit=left, seed=seed, tolerance=_TOLERANCE, worthwhile=_WORTHWHILE)
        for index, offset in zip(members, result.offsets.tolist(), strict=True):
            offsets[index] = offset
        heights[key] = result.height
        solvers.append(
            Solver(
                name=result.solver,
                problem=f"memory_mapping[{key}]",
                value=float(result.height),
                bound=float(result.lower_bound),
                seconds=time.perf_counter() - begin,
                seed=seed,
            )
        )
    placed = [msgspec.structs.replace(buffer, offset=offset) for buffer, offset in zip(buffers, offsets, strict=True)]
    return placed, heights, tuple(solvers)
