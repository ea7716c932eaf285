"""Kernels of regions in the order that ``cost_model.kernel_order`` chooses, and what generated code says of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

from .. import torch_internals
from ..cost_model import kernel_order as model
from ..cost_model import order_moves
from ..cost_model.kernel_order import OrderAnswer, OrderProblem, Value, choose_order, lower_bound, peak_of
from ..cost_model.order_moves import moved_around_peak
from ..cost_model.region_memory import KernelOrder
from ..torch_internals import KernelValue

_LINE = re.compile(r"^# kernel order: peak (\d+), Inductor's (\d+), bound (\d+), (\d+) kernels, (\d+) windows$", re.M)


def kernel_order(mode: str = "memory") -> contextlib.AbstractContextManager[None]:
    """Inside, kernels are ordered for the least memory; ``inductor``: as Inductor's heuristics order them."""
    if mode == "inductor":
        return contextlib.nullcontext()
    return torch_internals.kernel_order(_choose, f"effcc kernel order {_digest()}")


_little_memory: ContextVar[bool] = ContextVar("little_memory", default=False)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Inside, seconds are spent on orders of less memory, and it counts that kernels write over what they are the last
    to read."""
    token = _little_memory.set(True)
    try:
        with torch_internals.marked("effcc little memory"):
            yield
    finally:
        _little_memory.reset(token)


def order_in(source: str) -> KernelOrder | None:
    """What the comment in a generated wrapper says, None if there is none."""
    found = _LINE.search(source)
    if found is None:
        return None
    peak, given, bound, kernels, windows = map(int, found.groups())
    return KernelOrder(peak=peak, given=given, bound=bound, kernels=kernels, windows=windows)


def _choose(
    before: tuple[tuple[int, ...], ...], values: tuple[KernelValue, ...], given: tuple[int, ...]
) -> tuple[Sequence[int], str]:
    if _little_memory.get():
        found = _of_little_memory(
            OrderProblem(len(before), before, tuple(Value(*value[:5]) for value in values)), given
        )
    else:
        staying = tuple(Value(*value[:4]) for value in values if not value.lent)
        found = choose_order(OrderProblem(len(before), before, staying), given)
    text = (
        f"kernel order: peak {found.peak}, Inductor's {found.given}, bound {found.bound}, {len(before)} kernels, "
        f"{found.windows} windows"
    )
    return found.order, text


def _of_little_memory(problem: OrderProblem, given: tuple[int, ...]) -> OrderAnswer:
    """From Inductor's order and from that of the graph, in which recomputation stands where it was planned to be, on to
    less memory."""
    if problem.count > model.LONGEST:
        return choose_order(problem, given)
    bound = lower_bound(problem)
    starts = (given, tuple(range(problem.count)))
    order, _ = min((moved_around_peak(problem, start, bound) for start in starts), key=lambda found: found[1])
    found = choose_order(problem, order)
    return replace(found, given=peak_of(problem, given))


@functools.cache
def _digest() -> str:
    """Of the code that chooses: orders of another version are not taken from the code cache."""
    files = (model.__file__, order_moves.__file__, __file__)
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()[:16]
