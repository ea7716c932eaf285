"""Kernels of regions in the order that ``cost_model.kernel_order`` chooses, and what generated code says of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from .. import torch_internals
from ..cost_model import kernel_order as model
from ..cost_model.kernel_order import OrderProblem, Value, choose_order
from ..cost_model.region_memory import KernelOrder
from ..torch_internals import KernelValue

_LINE = re.compile(r"^# kernel order: peak (\d+), Inductor's (\d+), bound (\d+), (\d+) kernels, (\d+) windows$", re.M)


def kernel_order(mode: str = "memory") -> contextlib.AbstractContextManager[None]:
    """Inside, kernels are ordered for the least memory; ``inductor``: as Inductor's heuristics order them."""
    if mode == "inductor":
        return contextlib.nullcontext()
    return torch_internals.kernel_order(_choose, f"effcc kernel order {_digest()}")


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
    problem = OrderProblem(len(before), before, tuple(Value(*value) for value in values))
    found = choose_order(problem, given)
    text = (
        f"kernel order: peak {found.peak}, Inductor's {found.given}, bound {found.bound}, {problem.count} kernels, "
        f"{found.windows} windows"
    )
    return found.order, text


@functools.cache
def _digest() -> str:
    """Of the code that chooses: orders of another version are not taken from the code cache."""
    return hashlib.sha256(Path(model.__file__).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
