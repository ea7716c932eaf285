"""The master problem: an option for every layer (what it keeps, and what it swaps), as a mixed-integer program.

Sets
    i in blocks, in the forward's order;  o in options of block i
Variables
    x[i,o] in {0,1}   block i takes option o
    stall  >= 0       seconds that the step waits for copies
    equal blocks take options in order of saved bytes, so x counts how many take each
    saved[i], swapped[i], again[i] = sum_o (bytes kept, bytes on the host, seconds of recomputation) x[i,o]
Constraints
    sum_o x[i,o] = 1
    memory at the beginning of the backward, and in the backward of each block j:
        start                 + sum_{i}      saved[i]                                       <= budget
        transient[j,o] x[j,o] + sum_{i<j}    saved[i]  + swapped[j-1] fetched ahead         <= budget
    copies out of blocks i >= k end before the backward begins; copies in for blocks i >= k end before k's backward does
        sum_{i>=k} swapped[i] / out <= seconds of the forward from k on
        sum_{i>=k} swapped[i] / in  <= seconds of the backward down to k, recomputation counted, + stall
    sum_i swapped[i] <= host
Objective
    least seconds of recomputation and waiting (or, to find the floor, the least budget)

After MEMO (Zhao et al. 2024), whose share alpha mixes two options of every layer: all swapped, and all but two values
computed again.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .blocks import Block
from .host_link import HostLink
from .options import Moments, Option


@dataclass(frozen=True)
class MasterSolution:
    """``chosen[i]`` is the option of block i. ``bound`` is the relaxation's value: seconds, or bytes where the floor
    was asked for."""

    chosen: tuple[int, ...]
    value: float
    bound: float
    optimal: bool


#: Bytes and seconds are given to the solver in these units, so that its tolerances fit.
_BYTES, _SECONDS = 1 << 20, 1e-6


class Master:
    """The model of one set of options, which is built once and solved for one budget after the other."""

    def __init__(
        self,
        blocks: Sequence[Block],
        options: Sequence[Sequence[Option]],
        moments: Moments,
        host: HostLink | None = None,
    ) -> None:
        from ortools.math_opt.python import mathopt

        self.model: Any = mathopt.Model(name="activations")
        model = self.model
        self.x = x = [[model.add_binary_variable() for _ in found] for found in options]
        self.limit = limit = model.add_variable(lb=0.0)

        def total(amount: Callable[[Option], float]) -> list[Any]:
            pairs = zip(options, x, strict=True)
            return [_weighed(map(amount, found), row) for found, row in pairs]

        saved = total(lambda o: o.saved_bytes / _BYTES)
        swapped = total(lambda o: o.swapped_bytes / _BYTES)
        again = total(lambda o: o.seconds / _SECONDS)
        transient = total(lambda o: o.transient / _BYTES)
        for row in x:
            model.add_linear_constraint(mathopt.fast_sum(row) == 1)
        _order_equal_blocks(model, blocks, options, x)
        model.add_linear_constraint(moments.start / _BYTES + mathopt.fast_sum(saved) <= limit)
        copies = host is not None and any(o.swapped_bytes for found in options for o in found)
        for j in range(len(blocks)):
            ahead = swapped[j - 1] if copies and j else 0.0
            model.add_linear_constraint(mathopt.fast_sum([transient[j], *saved[:j], ahead]) <= limit)
        stall = model.add_variable(lb=0.0)
        if host is not None and copies:
            for i in range(len(blocks)) if host.overlapped else ():
                after = mathopt.fast_sum(swapped[i:])
                out, back = host.out / _BYTES * _SECONDS, host.back / _BYTES * _SECONDS
                model.add_linear_constraint(after <= out * sum(moments.forward_seconds[i:]) / _SECONDS + out * stall)
                running = sum(moments.backward_seconds[i:]) / _SECONDS
                model.add_linear_constraint(after <= back * (running + mathopt.fast_sum(again[i:]) + stall))
            model.add_linear_constraint(mathopt.fast_sum(swapped) <= host.capacity / _BYTES)
        # Swapping what need not be swapped is not worth a copy.
        self.price = mathopt.fast_sum([*again, stall]) + 1e-4 * mathopt.fast_sum(swapped)

    def solve(self, budget: int | None, time_limit: float = 10.0) -> MasterSolution | None:
        """The best choice within ``budget`` bytes; None: the one with the least peak. None is returned where none
        fits."""
        from ortools.math_opt.python import mathopt

        fixed = None if budget is None else budget / _BYTES
        self.limit.lower_bound, self.limit.upper_bound = fixed or 0.0, math.inf if fixed is None else fixed
        self.model.minimize(self.price if budget is not None else self.limit)
        self._set_whole(False)
        relaxed = mathopt.solve(self.model, mathopt.SolverType.GLOP)
        if relaxed.termination.reason != mathopt.TerminationReason.OPTIMAL:
            return None
        self._set_whole(True)
        parameters = mathopt.SolveParameters(
            time_limit=datetime.timedelta(seconds=time_limit), relative_gap_tolerance=1e-3, threads=1, random_seed=0
        )
        result = mathopt.solve(self.model, mathopt.SolverType.GSCIP, params=parameters)
        if not result.has_primal_feasible_solution():
            return None
        values = result.variable_values()
        chosen = tuple(max(range(len(row)), key=lambda o: values[row[o]]) for row in self.x)
        unit = _SECONDS if budget is not None else _BYTES
        return MasterSolution(
            chosen,
            result.objective_value() * unit,
            relaxed.objective_value() * unit,
            result.termination.reason == mathopt.TerminationReason.OPTIMAL,
        )

    def _set_whole(self, whole: bool) -> None:
        """Whether choices are whole, or may be fractions."""
        for row in self.x:
            for variable in row:
                variable.integer = whole


def _weighed(amounts: Iterable[float], row: Sequence[Any]) -> Any:
    """The sum of ``row``'s variables, each times its amount."""
    from ortools.math_opt.python import mathopt

    return mathopt.fast_sum([amount * variable for amount, variable in zip(amounts, row, strict=True)])


def _order_equal_blocks(
    model: Any, blocks: Sequence[Block], options: Sequence[Sequence[Option]], x: Sequence[Sequence[Any]]
) -> None:
    """Of two equal blocks, with others between them or none, the later one in the forward saves no less than the
    earlier: its backward comes first, and what it saves is gone when the earlier one's begins. Only the counts are
    left to choose."""
    from ortools.math_opt.python import mathopt

    last: dict[tuple[object, ...], int] = {}
    for k, block in enumerate(blocks):
        alike = (block.kind, *(o.saved_bytes for o in options[k]))
        i = last.get(alike)
        last[alike] = k
        if i is None:
            continue
        order = sorted(range(len(options[i])), key=lambda o: -options[i][o].saved_bytes)
        for end in range(1, len(order)):
            if options[i][order[end - 1]].saved_bytes == options[i][order[end]].saved_bytes:
                continue
            earlier, later = (mathopt.fast_sum([x[b][o] for o in order[:end]]) for b in (i, k))
            model.add_linear_constraint(earlier <= later)
