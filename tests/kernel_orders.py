"""Orders of kernels, for the tests of what chooses them."""

from __future__ import annotations

from collections.abc import Sequence

from effcc.cost_model.kernel_order import OrderProblem


def legal(problem: OrderProblem, order: Sequence[int]) -> bool:
    """Whether every kernel comes after those that it needs."""
    place = {kernel: at for at, kernel in enumerate(order)}
    return all(place[needed] < place[kernel] for kernel in order for needed in problem.before[kernel])
