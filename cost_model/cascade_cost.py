"""Seconds of a fused cascade's kernel on a calibrated CPU.

Its tile programs tell (``tile_cost.py``), and only the room that generates kernels can make them: it says here how it
prices a cascade. Without, the products count at the rate that was measured, and every point of a map or of a plain
reduction executes its operations on vectors and calls its functions, which cost what they do in other generated code
(``generated_loops.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy

from ..ir.cascade import Cascade
from ..ir.fused_cascade import FusedCascade
from .devices import Device, Figure
from .generated_loops import MEASURED

#: Seconds of a cascade's generated kernel; None where there is none, or nothing was measured.
Pricing = Callable[[FusedCascade, Device], float | None]
_pricing: list[Pricing] = []


def price_kernels(pricing: Pricing) -> None:
    """Kernels of cascades are priced by ``pricing`` from now on, in this process."""
    _pricing[:] = [pricing]


def kernel_seconds(fused: FusedCascade, device: Device) -> float | None:
    """Seconds of the generated kernel by its tile programs, None where they are not known."""
    return _pricing[0](fused, device) if _pricing else None


def map_seconds(cascade: Cascade, sizes: Mapping[str, int], added: Mapping[str, Figure], lanes: int) -> float:
    """Seconds on one thread; ``sizes``: of every rank, ``lanes`` of a vector. Sums of products are left out, for they
    are matrix products."""
    if "statement" not in added:
        return 0.0
    total = 0.0
    for einsum in cascade.einsums:
        if einsum.reduction == "sum" and len(einsum.reads) > 1:
            continue
        points = math.prod(sizes[symbol.name] for symbol in einsum.space)
        operations = max(1, int(sympy.count_ops(einsum.body))) + (einsum.reduction is not None)
        called = (type(each).__name__.lower() for each in einsum.body.atoms(sympy.Function))
        names = [MEASURED.get(name, name) for name in called]
        total += points * operations * added["statement"].value / lanes
        total += points * sum(added[name].value for name in names if name in added)
    return total
