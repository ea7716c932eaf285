"""The master problem: an option for every layer (what it keeps, and what it swaps), as a mixed-integer program.

Sets
    i in blocks, in the forward's order;  o in options of block i
Variables
    x[i,o] in {0,1}   block i takes option o
    stall  >= 0       seconds that the step waits for copies
    equal blocks in a row take options in order of saved bytes, so x counts how many take each
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
from collections.abc import Callable, Sequence
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


def solve_master(
    blocks: Sequence[Block],
    options: Sequence[Sequence[Option]],
    moments: Moments,
    budget: int | None,
    host: HostLink | None = None,
    time_limit: float = 10.0,
) -> MasterSolution | None:
    """The best choice within ``budget`` bytes; None: the one with the least peak. None is returned where none fits."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model(name="activations")
    x = [[model.add_binary_variable() for _ in found] for found in options]
    fixed = None if budget is None else budget / _BYTES
    limit = model.add_variable(lb=fixed or 0.0, ub=math.inf if fixed is None else fixed)

    def total(amount: Callable[[Option], float]) -> list[Any]:
        pairs = zip(options, x, strict=True)
        return [sum(amount(o) * v for o, v in zip(found, row, strict=True)) for found, row in pairs]

    saved = total(lambda o: o.saved_bytes / _BYTES)
    swapped = total(lambda o: o.swapped_bytes / _BYTES)
    again = total(lambda o: o.seconds / _SECONDS)
    for row in x:
        model.add_linear_constraint(sum(row) == 1)
    _order_equal_blocks(model, blocks, options, x)
    model.add_linear_constraint(moments.start / _BYTES + sum(saved) <= limit)
    copies = host is not None and any(o.swapped_bytes for found in options for o in found)
    for j in range(len(blocks)):
        own = sum(o.transient / _BYTES * v for o, v in zip(options[j], x[j], strict=True))
        ahead = swapped[j - 1] if copies and j else 0.0
        model.add_linear_constraint(own + sum(saved[:j]) + ahead <= limit)
    stall = model.add_variable(lb=0.0)
    if host is not None and copies:
        for i in range(len(blocks)) if host.overlapped else ():
            after = sum(swapped[i:])
            out, back = host.out / _BYTES * _SECONDS, host.back / _BYTES * _SECONDS
            model.add_linear_constraint(after <= out * sum(moments.forward_seconds[i:]) / _SECONDS + out * stall)
            running = sum(moments.backward_seconds[i:]) / _SECONDS
            model.add_linear_constraint(after <= back * (running + sum(again[i:]) + stall))
        model.add_linear_constraint(sum(swapped) <= host.capacity / _BYTES)
    # Swapping what need not be swapped is not worth a copy.
    model.minimize(sum(again) + stall + 1e-4 * sum(swapped) if budget is not None else limit)
    relaxed = mathopt.solve(_relaxation(model, x), mathopt.SolverType.GLOP)
    if relaxed.termination.reason != mathopt.TerminationReason.OPTIMAL:
        return None
    parameters = mathopt.SolveParameters(
        time_limit=datetime.timedelta(seconds=time_limit), relative_gap_tolerance=1e-3, threads=1, random_seed=0
    )
    result = mathopt.solve(model, mathopt.SolverType.GSCIP, params=parameters)
    if not result.has_primal_feasible_solution():
        return None
    values = result.variable_values()
    chosen = tuple(max(range(len(row)), key=lambda o: values[row[o]]) for row in x)
    unit = _SECONDS if budget is not None else _BYTES
    return MasterSolution(
        chosen,
        result.objective_value() * unit,
        relaxed.objective_value() * unit,
        result.termination.reason == mathopt.TerminationReason.OPTIMAL,
    )


def _relaxation(model: object, x: Sequence[Sequence[object]]) -> object:
    """The model with fractional choices. It shares variables with the model, which is solved as integers later."""
    from ortools.math_opt.python import mathopt

    relaxed = mathopt.Model.from_model_proto(model.export_model())  # type: ignore[attr-defined]
    for row in x:
        for variable in row:
            relaxed.get_variable(variable.id).integer = False  # type: ignore[attr-defined]
    return relaxed


def _order_equal_blocks(
    model: object, blocks: Sequence[Block], options: Sequence[Sequence[Option]], x: Sequence[Sequence[object]]
) -> None:
    """Of two equal blocks in a row, the later one in the forward saves no less than the earlier: its backward comes
    first, and what it saves is gone when the earlier one's begins. Only the counts are left to choose."""
    for i in range(len(blocks) - 1):
        if blocks[i].kind != blocks[i + 1].kind or len(options[i]) != len(options[i + 1]):
            continue
        if [o.saved_bytes for o in options[i]] != [o.saved_bytes for o in options[i + 1]]:
            continue
        order = sorted(range(len(options[i])), key=lambda o: -options[i][o].saved_bytes)
        for end in range(1, len(order)):
            if options[i][order[end - 1]].saved_bytes == options[i][order[end]].saved_bytes:
                continue
            model.add_linear_constraint(  # type: ignore[attr-defined]
                sum(x[i][o] for o in order[:end]) <= sum(x[i + 1][o] for o in order[:end])  # type: ignore[misc]
            )
